"""Following a file of JSON lines that another process, or this one, writes: each look reads what has been added since the last."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fedgraft.files import parse_json


class Tail:
    """The complete lines of a file so far.

    A last line that is not finished yet waits for its end. `lines` starts anew when the file has become shorter or is another one, as when
    a resume drops what was not committed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Any] = []
        self._offset, self._file = 0, (0, 0)

    def look(self) -> list[Any]:
        """All lines, after reading what is new; those that are no JSON are left out, nothing is raised for a file that is not there."""
        try:
            with self.path.open("rb") as source:
                found = os.fstat(source.fileno())
                if (found.st_dev, found.st_ino) != self._file or found.st_size < self._offset:
                    self.lines, self._offset, self._file = [], 0, (found.st_dev, found.st_ino)
                source.seek(self._offset)
                fresh = source.read()
        except OSError:
            self.lines, self._offset, self._file = [], 0, (0, 0)
            return self.lines
        complete = fresh[: fresh.rfind(b"\n") + 1]
        self._offset += len(complete)
        self.lines += [value for line in complete.split(b"\n") if (value := _parsed(line)) is not None]
        return self.lines


def _parsed(line: bytes) -> Any:
    try:
        return parse_json(line)
    except ValueError:
        return None
