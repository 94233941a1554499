"""A run or a sweep seen from outside: its folder is read again and again, and never written to.

A look costs what has been added since the last: of `rounds.jsonl` only the new lines are read. Whether a run goes on is told by `now.json`
and the process named there; the lock is not tried, since whoever tries it holds it for a moment, in which a resume would be refused.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedgraft import files
from fedgraft.report.now import FILE
from fedgraft.report.record import SWEEP, Record, read_document, read_recipe
from fedgraft.report.table import run_tables
from fedgraft.report.tail import Tail

RECENT = 5
"""Rounds whose mean time the rest is expected to take."""
SILENCE = 600.0
"""Seconds after which a run on another machine that says nothing is not called running any more."""


@dataclass(kw_only=True)
class View:
    """How a run stands."""

    folder: Path
    state: str = "waiting"
    """`waiting` (nothing is there yet), `running`, `stopped`, `failed`, `killed`, `unknown` or `finished`."""
    reason: str = ""
    """Why it failed."""
    method: str = ""
    done: int = 0
    planned: int = 0
    """Rounds."""
    now: str = ""
    """What goes on: phase, client, steps, loss."""
    left: float | None = None
    """Seconds until the last round, at the pace of the last ones."""
    mean: list[float] = field(default_factory=list)
    """Mean loss by round."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Client -> loss in each of the rounds it took part in."""
    bytes_up: int = 0
    bytes_down: int = 0
    """Of all rounds so far."""
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    """Figure in words -> model -> mean over clients; of a finished run."""


class Watched:
    """One run folder; it need not be there yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._forget()

    def _forget(self) -> None:
        self.rounds, self.view = Tail(self.folder / "rounds.jsonl"), View(folder=self.folder)
        self._lines: list[Any] = []
        self._counted = 0
        self._note: dict[str, Any] = {}
        self._recipe: tuple[float, dict[str, Any]] = (0.0, {})
        self._results: tuple[float, dict[str, dict[str, float]]] = (0.0, {})

    def look(self) -> View:
        """How it stands now.

        Raises:
            ValueError: `recipe.yaml` or `results.json` is damaged or newer than this fedgraft.
        """
        written = _written(self.folder / "recipe.yaml")
        if not written:
            self._forget()  # whatever was there is gone
            return self.view
        if written != self._recipe[0]:
            self._recipe = (written, read_recipe(self.folder / "recipe.yaml"))
        recipe, view = self._recipe[1], self.view
        self._count()
        view.method, view.planned = str(recipe["method"]["name"]), int(recipe["federation"]["rounds"])
        self._judge()
        view.left = self._left() if view.state == "running" else None
        return view

    def _count(self) -> None:
        """Add the rounds that are new."""
        lines, view = self.rounds.look(), self.view
        if lines is not self._lines:  # the file is another one
            self._lines, self._counted = lines, 0
            view.mean, view.losses, view.bytes_up, view.bytes_down = [], {}, 0, 0
        for line in lines[self._counted :]:
            view.bytes_up += line["bytes_up"]
            view.bytes_down += line["bytes_down"]
            if line.get("loss") is not None:
                view.mean.append(line["loss"])
            for client, facts in line["clients"].items():
                if "loss" in facts:
                    view.losses.setdefault(client, []).append(facts["loss"])
        self._counted = view.done = len(lines)

    def _judge(self) -> None:
        """State, reason and what goes on."""
        view, note = self.view, self._read_note()
        view.now, view.reason, view.results = "", "", {}
        state, _, why = str(note.get("state", "")).partition(": ")
        if state == "running" and (alive := _alive(note)) is not False:
            view.state, view.now = "running" if alive else "unknown", _activity(note)
        elif results := self._finished():
            view.state, view.results = "finished", results
        elif state == "running":
            view.state = "killed"
        else:
            view.state, view.reason = state or "unknown", why

    def _read_note(self) -> dict[str, Any]:
        path = self.folder / FILE
        try:
            self._note = dict(files.parse_json(path.read_bytes()))
        except FileNotFoundError:
            self._note = {}
        except (OSError, ValueError, TypeError):
            pass  # met half of it; the last one will do
        return self._note

    def _finished(self) -> dict[str, dict[str, float]]:
        """Mean figures, {} unless all rounds are evaluated."""
        written = _written(self.folder / "results.json")
        if not written or read_document(self.folder / "results.json").get("rounds") != self.view.planned:
            return {}
        if written != self._results[0]:
            tables = run_tables(Record.load(self.folder))
            self._results = (written, {table.title: table.summary["mean"] for table in tables} or {"": {}})
        return self._results[1]

    def _left(self) -> float | None:
        view, recent = self.view, [float(line["seconds"]) for line in self._lines[-RECENT:]]
        if not recent:
            return None
        pace = sum(recent) / len(recent)
        begun = min(max(0.0, time.time() - _written(self.rounds.path)), pace)
        return max(0.0, (view.planned - view.done) * pace - begun)


class WatchedSweep:
    """A sweep folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[str, Watched] = {}
        self._read = 0.0
        self._failures: dict[str, str] = {}

    def look(self) -> list[View]:
        """Every point in the order of the sweep; those that are finished are not read again."""
        written = _written(self.folder / SWEEP)
        if written != self._read:
            points = read_document(self.folder / SWEEP).get("points", [])
            self._read, self._failures = written, {point["name"]: point.get("failure", "") for point in points}
            self.runs = {name: self.runs.get(name) or Watched(self.folder / name) for name in self._failures}
        for name, run in self.runs.items():
            if run.view.state != "finished":
                view = run.look()
                if self._failures[name] and view.state != "running":
                    view.state, view.reason = "failed", self._failures[name]
        return [run.view for run in self.runs.values()]


def find(folder: Path) -> Watched | WatchedSweep | None:
    """What lies in the folder; None while there is nothing.

    Raises:
        ValueError: it holds something else.
    """
    if (folder / SWEEP).is_file():
        return WatchedSweep(folder)
    if (folder / "recipe.yaml").is_file():
        return Watched(folder)
    if folder.exists() and (folder.is_file() or any(not entry.name.startswith(".") for entry in folder.iterdir())):
        raise ValueError(f"{folder}: neither a run nor a sweep (it has no recipe.yaml and no {SWEEP})")
    return None


def _alive(note: dict[str, Any]) -> bool | None:
    """Whether the process of a note is still there; None where it can't be known, since it was on another machine and is silent."""
    import platform

    import psutil

    if note.get("host") != platform.node():
        return True if time.time() - note["time"] < SILENCE else None
    try:
        process = psutil.Process(note["process"])
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= note["time"] + 1)
    except psutil.Error:
        return False


def _activity(note: dict[str, Any]) -> str:
    loss = note.get("loss")
    count = f"{int(note['done'])}/{note['total']}" if note.get("total") else ""
    return "  ".join(word for word in (note["phase"], count, note["title"], "" if loss is None else f"loss {loss:.3f}") if word)


def _written(path: Path) -> float:
    """When a file was last written; 0 where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
