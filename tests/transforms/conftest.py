"""Whole tiny runs."""

from tests.methods.conftest import place, start

__all__ = ["place", "start"]
