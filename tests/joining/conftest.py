"""Runs to start from, and the command line."""

from tests.run.conftest import command, world
from tests.use.conftest import trained

__all__ = ["command", "trained", "world"]
