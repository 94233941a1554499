"""Progress of long work: bars in a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from fedgraft.words import labelled

SHOWN_LOSSES = 6
"""Clients whose latest loss is shown under the bars."""


class Progress(Protocol):
    """What the runner reports to."""

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps starts."""

    def part(self, client: str, title: str, done: int, total: int, loss: float | None = None, note: str = "") -> None:
        """The step in hand, called `title`, is a client's and has come to `done` of `total`; `loss` is its current training loss."""

    def step(self, note: str = "") -> None:
        """One step is done."""

    def warn(self, text: str) -> None:
        """Something that the user should know."""

    def tell(self, rows: Sequence[tuple[str, str]]) -> None:
        """Something worth reading, as (label, text) a line."""

    def close(self) -> None:
        """Nothing more comes."""


class Quiet:
    """Says nothing."""

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps starts."""

    def part(self, client: str, title: str, done: int, total: int, loss: float | None = None, note: str = "") -> None:
        """A part of a step is done."""

    def step(self, note: str = "") -> None:
        """One step is done."""

    def warn(self, text: str) -> None:
        """Something that the user should know."""

    def tell(self, rows: Sequence[tuple[str, str]]) -> None:
        """Something worth reading, as (label, text) a line."""

    def close(self) -> None:
        """Nothing more comes."""


class Phase:
    """How far a phase is and how long it will take, at the mean pace so far."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done, self.began = name, total, 0.0, time.monotonic()

    def left(self) -> str:
        """Time left as [h:]mm:ss, "" before there is a pace: nothing is done, or within the first second."""
        taken = time.monotonic() - self.began
        if not 0 < self.done < self.total or taken < 1:
            return ""
        seconds = round(taken * (self.total - self.done) / self.done)
        hours, minutes = divmod(seconds // 60, 60)
        return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"

    def advance(self, share: float) -> None:
        """The step in hand has come to `share` of itself; 1 ends it."""
        self.done = int(self.done) + min(share, 1.0)


def part_text(title: str, done: int, total: int, loss: float | None, note: str) -> str:
    """One line on the step in hand."""
    words = [title, note, f"{done:,}/{total:,}", "" if loss is None else f"loss {loss:.3f}"]
    return "  ".join(word for word in words if word)


def reply_text(round_number: int, client: str, facts: Mapping[str, Any], note: str = "") -> str:
    """One line on a reply; `note` is on the round."""
    if "calibration_tokens" in facts:
        return f"{client}  {facts['calibration_tokens']:,} calibration tokens (the paper's runs: 262,144)"
    loss = facts.get("loss")
    if not isinstance(loss, float) and not note:
        return client
    told = [f"round {round_number + 1}", client, f"loss {loss:.3f}" if isinstance(loss, float) else "", note]
    return "  ".join(word for word in told if word)


class Lines:
    """Plain lines through `write`, `phase done/total left m:ss note`: when a phase starts, at its end, and between every `every` seconds.

    Verbose: a line for every step.
    """

    def __init__(self, write: Callable[[str], object], every: float = 5.0, verbose: bool = False) -> None:
        self.write, self.every, self.verbose = write, every, verbose
        self.phase, self.last = Phase("", 0), 0.0

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps starts."""
        self.phase = Phase(phase, total)
        self._say("")

    def part(self, client: str, title: str, done: int, total: int, loss: float | None = None, note: str = "") -> None:
        """A part of a step is done."""
        self.phase.advance(min(done / total, 0.999))
        if self._due():
            self._say(part_text(title, done, total, loss, note))

    def step(self, note: str = "") -> None:
        """One step is done."""
        self.phase.advance(1.0)
        if self.verbose or self._due() or self.phase.done >= self.phase.total:
            self._say(note)

    def warn(self, text: str) -> None:
        """Something that the user should know."""
        self.write(f"warning: {text}")

    def tell(self, rows: Sequence[tuple[str, str]]) -> None:
        """Something worth reading, as (label, text) a line."""
        for label, text in rows:
            self.write(f"{label:<10} {text}")

    def close(self) -> None:
        """Nothing more comes."""

    def _due(self) -> bool:
        return time.monotonic() - self.last >= self.every

    def _say(self, note: str) -> None:
        self.last = time.monotonic()
        left = self.phase.left()
        words = [f"{self.phase.name:<10} {int(self.phase.done)}/{self.phase.total}", f"left {left}" if left else "", note]
        self.write("  ".join(word for word in words if word))


class Bars:
    """A rich progress bar per phase with the time left, and under it the latest loss of the clients last trained.

    Verbose: a line above the bars for every step.
    """

    def __init__(self, console: Any, verbose: bool = False) -> None:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = [
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[count]}", style="green"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", style="cyan"),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
        ]
        self.bars = RichProgress(*columns, console=console)
        self.losses_line = RichProgress(TextColumn("{task.description}", style="dim", markup=False), console=console)
        self.console, self.verbose = console, verbose
        self.phase = Phase("", 0)
        self.task: Any = None
        self.live: Any = None
        self.losses: dict[str, float] = {}

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps starts."""
        if self.live is None:  # only now, so that whoever waits before may draw something of their own
            self._start()
        self.phase = Phase(phase, total)
        self.task = self.bars.add_task(phase, total=total, note="", count=f"0/{total}", left="")

    def part(self, client: str, title: str, done: int, total: int, loss: float | None = None, note: str = "") -> None:
        """A part of a step is done."""
        self.phase.advance(min(done / total, 0.999))
        if loss is not None:
            self.losses.pop(client, None)  # the latest comes last
            self.losses[client] = loss
            shown = [f"{name} {value:.3f}" for name, value in list(self.losses.items())[-SHOWN_LOSSES:]]
            self.losses_line.update(self.losses_task, description=f"{'losses':<10} {'  '.join(shown)}", visible=True)
        self._show(part_text(title, done, total, loss, note))

    def step(self, note: str = "") -> None:
        """One step is done."""
        self.phase.advance(1.0)
        self._show(note)
        if self.verbose and note:
            self.console.print(f"{self.phase.name:<10} {note}", markup=False, highlight=False)

    def warn(self, text: str) -> None:
        """Something that the user should know."""
        self.console.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    def tell(self, rows: Sequence[tuple[str, str]]) -> None:
        """Something worth reading, as (label, text) a line."""
        from rich.markup import escape

        for row in rows:
            for label, text in labelled(*row, self.console.width):
                self.console.print(f"[bold]{label}[/] {escape(text)}", highlight=False)

    def close(self) -> None:
        """Nothing more comes."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _start(self) -> None:
        from rich.console import Group
        from rich.live import Live

        self.losses_task = self.losses_line.add_task("", total=None, visible=False)
        self.live = Live(Group(self.bars, self.losses_line), console=self.console, refresh_per_second=8)
        self.live.start()

    def _show(self, note: str) -> None:
        left = self.phase.left()
        count = f"{int(self.phase.done)}/{self.phase.total}"
        self.bars.update(self.task, completed=self.phase.done, note=note, count=count, left=f"left {left}" if left else "")
