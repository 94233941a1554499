"""Whole tiny runs, as in the tests of the methods."""

from tests.methods.conftest import place, start

__all__ = ["place", "start"]
