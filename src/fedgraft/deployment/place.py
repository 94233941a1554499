"""Where a site's things lie, read from its `site.yaml` without checking the rest, so that a short-lived process finds the worker fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgraft import files
from fedgraft.yaml_text import read_yaml

WHAT = "site.yaml"
FOLDER = "state"
"""Default of the key `folder`."""


@dataclass(frozen=True)
class Place:
    """Folders of a site."""

    state: Path
    """Client memories and the log."""
    door: Path
    """The worker's socket."""

    @property
    def log(self) -> Path:
        """What was asked and what has left."""
        return self.state / "site.log.jsonl"

    def run(self, run: str) -> Path:
        """What is kept of one run."""
        return self.state / "runs" / run

    def memories(self, run: str) -> Path:
        """The client memories of one run."""
        return self.run(run) / "clients"


def beside(file: Path, path: str) -> Path:
    """A path that a settings file names, relative to that file's folder."""
    return (file.parent / Path(path).expanduser()).absolute()


def place_of(file: Path, values: dict[str, Any] | None = None) -> Place:
    """The folders that a site's settings name.

    Args:
        file: the settings' file, to which relative paths belong.
        values: its content; None reads it.

    Raises:
        ValueError: it is no YAML mapping, or names a folder by something else than text.
        OSError: there is no such file.
    """
    if values is None:
        values = read_yaml(files.read_text(file), str(file), WHAT) or {}
    folder, door = values.get("folder") or FOLDER, values.get("socket")
    for key, value in (("folder", folder), ("socket", door)):
        if not isinstance(value, str | None):
            raise ValueError(f"{file}: {key}: name a folder, this is a {type(value).__name__}")
    state = beside(file, folder)
    return Place(state=state, door=beside(file, door) if door else state / "socket")
