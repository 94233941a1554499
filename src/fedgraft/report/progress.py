"""Progress of long work: bars in a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fedgraft.words import labelled


class Progress(Protocol):
    """What the runner reports to."""

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps starts."""

    def step(self, note: str = "") -> None:
        """One step is done."""

    def tell(self, rows: Sequence[tuple[str, str]]) -> None:
        """Something worth reading, as (label, text) a line."""

    def close(self) -> None:
        """Nothing more comes."""


class Quiet:
    """Says nothing."""

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps starts."""

    def step(self, note: str = "") -> None:
        """One step is done."""

    def tell(self, rows: Sequence[tuple[str, str]]) -> None:
        """Something worth reading, as (label, text) a line."""

    def close(self) -> None:
        """Nothing more comes."""


class Lines:
    """Plain lines through `write`, `phase done/total note`: when a phase starts, at its end, and between at most every `every` seconds."""

    def __init__(self, write: Callable[[str], object], every: float = 5.0) -> None:
        self.write, self.every = write, every
        self.phase, self.total, self.done, self.last = "", 0, 0, 0.0

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps starts."""
        self.phase, self.total, self.done, self.last = phase, total, 0, time.monotonic()
        self._say("")

    def step(self, note: str = "") -> None:
        """One step is done."""
        self.done += 1
        if time.monotonic() - self.last >= self.every or self.done == self.total:
            self.last = time.monotonic()
            self._say(note)

    def tell(self, rows: Sequence[tuple[str, str]]) -> None:
        """Something worth reading, as (label, text) a line."""
        for label, text in rows:
            self.write(f"{label:<10} {text}")

    def close(self) -> None:
        """Nothing more comes."""

    def _say(self, note: str) -> None:
        self.write(f"{self.phase:<10} {self.done}/{self.total}  {note}".rstrip())


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
            TextColumn("{task.fields[note]}", style="dim", markup=False),
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

    def tell(self, rows: Sequence[tuple[str, str]]) -> None:
        """Something worth reading, as (label, text) a line."""
        from rich.markup import escape

        for row in rows:
            for label, text in labelled(*row, self.bars.console.width):
                self.bars.console.print(f"[bold]{label}[/] {escape(text)}", highlight=False)

    def close(self) -> None:
        """Nothing more comes."""
        self.bars.stop()
