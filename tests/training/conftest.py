"""Tiny grafted models, as in the tests of the grafts."""

from tests.grafts.conftest import tiny_graft

__all__ = ["tiny_graft"]
