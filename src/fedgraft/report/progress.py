"""Progress of long work: bars in a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from typing import Any, Protocol


class Progress(Protocol):
    """What the runner reports to."""

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps starts."""

    def step(self, note: str = "") -> None:
        """One step is done."""

    def close(self) -> None:
        """Nothing more comes."""


class Quiet:
    """Says nothing."""

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps starts."""

    def step(self, note: str = "") -> None:
        """One step is done."""

    def close(self) -> None:
        """Nothing more comes."""


class Lines:
    """One line at the start of a phase and then at most one in `every` seconds, through `write`."""

    def __init__(self, write: Any, every: float = 5.0) -> None:
        self.write, self.every = write, every
        self.phase, self.total, self.done, self.last = "", 0, 0, 0.0

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps starts."""
        self.phase, self.total, self.done, self.last = phase, total, 0, time.monotonic()
        self.write(f"{phase}: {total} steps")

    def step(self, note: str = "") -> None:
        """One step is done."""
        self.done += 1
        if time.monotonic() - self.last >= self.every or self.done == self.total:
            self.last = time.monotonic()
            self.write(f"{self.phase}: {self.done}/{self.total} {note}".rstrip())

    def close(self) -> None:
        """Nothing more comes."""


class Bars:
    """A rich progress bar per phase with the time left."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = [
            TextColumn("[bold]{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
        ]
        self.bars = RichProgress(*columns, console=console)
        self.bars.start()
        self.task: Any = None

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps starts."""
        self.task = self.bars.add_task(phase, total=total, note="")

    def step(self, note: str = "") -> None:
        """One step is done."""
        self.bars.update(self.task, advance=1, note=note)

    def close(self) -> None:
        """Nothing more comes."""
        self.bars.stop()
