"""Run folders: a new one's name, never overwriting one, and what killed runs leave behind."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

from fedgraft import files
from fedgraft.report.record import resume_command

LEFTOVER = re.compile(r"\..*\.tmp")  # what a killed write leaves beside its target


def fresh(method: str) -> Path:
    """A folder for a new run that was given none."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{method}-{stamp}"


def refuse_occupied(folder: Path) -> None:
    """Let nothing but a new or empty folder pass; the lock and what killed writes left don't count.

    Raises:
        ValueError: it holds something, or is a file.
    """
    if folder.is_dir() and all(entry.name == files.LOCK or LEFTOVER.fullmatch(entry.name) for entry in folder.iterdir()):
        return
    if folder.exists():
        raise ValueError(f"{folder}: exists and is never overwritten; choose another --out, or continue it with: {resume_command(folder)}")


def clear(folder: Path) -> None:
    """Remove what killed writes left."""
    for path in folder.rglob("*.tmp"):
        if LEFTOVER.fullmatch(path.name):
            path.unlink()
