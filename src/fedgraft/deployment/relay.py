"""Progress from one process to another by way of a file: the run writes what happens, whoever looks on reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedgraft import files
from fedgraft.report.progress import Progress

EVENTS = frozenset({"begin", "part", "step", "warn", "tell"})
END = "end"
"""The last event: how the run ended, "" when well."""


class Relay:
    """A `Progress` that appends every call to a file as a JSON line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.sink = path.open("a", encoding="utf-8", newline="\n")

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps starts."""
        self._write("begin", phase, total)

    def part(self, client: str, title: str, done: int, total: int, loss: float | None = None, note: str = "") -> None:
        """A part of a step is done."""
        self._write("part", client, title, done, total, loss, note)

    def step(self, note: str = "") -> None:
        """One step is done."""
        self._write("step", note)

    def warn(self, text: str) -> None:
        """Something that the user should know."""
        self._write("warn", text)

    def tell(self, rows: Sequence[tuple[str, str]]) -> None:
        """Something worth reading, as (label, text) a line."""
        self._write("tell", list(rows))

    def close(self) -> None:
        """Nothing more comes from the run itself."""

    def end(self, trouble: str) -> None:
        """The run has ended; `trouble` says why it could not go on, "" when it is finished."""
        self._write(END, trouble)
        self.sink.close()

    def _write(self, *event: Any) -> None:
        self.sink.write(json.dumps(event, ensure_ascii=False) + "\n")
        self.sink.flush()


class Onlooker:
    """Reads a relay's file as it grows and passes it on."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path, self.progress, self.position = path, progress, 0
        self.ended: str | None = None
        """How the run ended, None as long as it has not."""

    def look(self) -> None:
        """Pass on what is new."""
        for name, *arguments in self._fresh():
            if name == END:
                self.ended = arguments[0]
            elif name in EVENTS:
                getattr(self.progress, name)(*arguments)

    def _fresh(self) -> Iterator[list[Any]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as source:
            source.seek(self.position)
            complete = source.read().rpartition(b"\n")[0]
        if complete:
            self.position += len(complete) + 1
            yield from map(files.parse_json, complete.split(b"\n"))
