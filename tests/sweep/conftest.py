"""The tiny world of the run tests, and its command line."""

from tests.run.conftest import command, world

__all__ = ["command", "world"]
