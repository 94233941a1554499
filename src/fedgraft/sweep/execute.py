"""Carrying a sweep out: each point is a process of its own that runs the ordinary command line, a few at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from fedgraft import files
from fedgraft.report.progress import Progress
from fedgraft.report.record import Record
from fedgraft.report.table import FIGURES
from fedgraft.signals import Terminated
from fedgraft.sweep import folder as sweep_folder
from fedgraft.sweep.plan import Point

POLL = 0.2  # seconds between looks at the processes
GRACE = 5.0  # seconds that Ctrl-C, which reaches the processes too, has to stop them before SIGTERM


class Process(Protocol):
    """What is asked of a process."""

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""

    def terminate(self) -> None:
        """Ask it to stop."""


Launch: TypeAlias = Callable[[Sequence[str], Path, int], Process]
"""(words of the fedgraft command, log to append to, threads or 0 for the machine's choice) -> the process."""


@dataclass(kw_only=True)
class Outcome:
    """How the points of a call ended."""

    folder: Path
    finished: list[str] = field(default_factory=list)
    """In the order of the points, those of earlier calls included."""
    failures: dict[str, str] = field(default_factory=dict)
    """Point -> the message its run ended with."""


@dataclass(kw_only=True)
class _Running:
    point: Point
    process: Process
    log: Path
    offset: int
    """Where this start's part of the log begins."""


def execute(folder: Path, points: Sequence[Point], *, jobs: int = 1, progress: Progress, launch: Launch | None = None) -> Outcome:
    """Start or resume every point that is not finished, `jobs` at a time; a point that fails does not stop the others.

    Raises:
        ValueError: fewer jobs than one; another sweep works in the folder; it holds something else, or another recipe under a point's name.
    """
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: at least 1 is needed")
    if folder.is_file():
        raise ValueError(f"{folder}: is a file; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder):
        sweep_folder.enter(folder, points)
        return _Sweep(folder, points, jobs, progress, launch or start_process).go()


class _Sweep:
    """The processes of one call."""

    def __init__(self, folder: Path, points: Sequence[Point], jobs: int, progress: Progress, launch: Launch) -> None:
        self.folder, self.points, self.jobs, self.progress, self.launch = folder, points, jobs, progress, launch
        self.waiting = [point for point in points if sweep_folder.state(folder, point.name) != "finished"]
        self.running: list[_Running] = []
        self.failures: dict[str, str] = {}
        self.rounds = -1
        self.threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else 0

    def go(self) -> Outcome:
        """Until none is left."""
        self.progress.begin("sweep", len(self.waiting))
        try:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.jobs:
                    self._start(self.waiting.pop(0))
                time.sleep(POLL)
                self._collect()
                self._tell()
        except KeyboardInterrupt as stop:
            self._stop(0.0 if isinstance(stop, Terminated) else GRACE)
            raise
        except BaseException:
            self._stop(0.0)
            raise
        finished = [point.name for point in self.points if sweep_folder.state(self.folder, point.name) == "finished"]
        return Outcome(folder=self.folder, finished=finished, failures=self.failures)

    def _start(self, point: Point) -> None:
        run, log = self.folder / point.name, self.folder / "logs" / f"{point.name}.log"
        fresh = sweep_folder.state(self.folder, point.name) == "new"
        recipe = sweep_folder.recipe_file(self.folder, point.name)
        words = ["run", str(recipe), "--out", str(run)] if fresh else ["resume", str(run)]
        log.parent.mkdir(exist_ok=True)
        offset = log.stat().st_size if log.exists() else 0
        self.running.append(_Running(point=point, process=self.launch(words, log, self.threads), log=log, offset=offset))

    def _collect(self) -> None:
        """Take note of the processes that have ended."""
        for one in list(self.running):
            code = one.process.poll()
            if code is None:
                continue
            self.running.remove(one)
            name, failure = one.point.name, ""
            if code == 0 and sweep_folder.state(self.folder, name) == "finished":
                self.progress.step(f"{name}  {_result(Record.load(self.folder / name))}")
            else:
                failure = self.failures[name] = _last_words(one, code)
                self.progress.warn(f"{name} failed, the others go on: {failure}")
                self.progress.step(f"{name}  failed")
            sweep_folder.note(self.folder, name, failure)

    def _tell(self) -> None:
        """How far the running ones are, whenever one has finished a round."""
        done = [len(files.read_lines(self.folder / one.point.name / "rounds.jsonl")) for one in self.running]
        total = [one.point.recipe.federation.rounds for one in self.running]
        if self.running and sum(done) != self.rounds:
            self.rounds = sum(done)
            names = ", ".join(one.point.name for one in self.running)
            self.progress.part(names, names, sum(done), max(1, sum(total)), note="rounds")

    def _stop(self, grace: float) -> None:
        """End every process; what they have finished is saved."""
        deadline = time.monotonic() + grace
        for one in self.running:
            try:
                one.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.process.terminate()
        for one in self.running:
            one.process.wait()


def start_process(words: Sequence[str], log: Path, threads: int) -> Process:
    """The command line in a process of its own, its output appended to `log`."""
    limited = {"OMP_NUM_THREADS": str(threads)} if threads and "OMP_NUM_THREADS" not in os.environ else {}
    environment = {**os.environ, **limited, "PYTHONUTF8": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "fedgraft", *words], stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=environment
        )


def _result(record: Record) -> str:
    """The mean of the personal models' first measured figure."""
    for figure, (heading, _, digits) in FIGURES.items():
        if values := record.figures("personal", figure):
            return f"{heading} {sum(values.values()) / len(values):.{digits}f}"
    return "finished"


def _last_words(one: _Running, code: int) -> str:
    """The error message at the end of the log."""
    with one.log.open("rb") as log:
        log.seek(one.offset)
        text = log.read().decode("utf-8", "replace").strip()
    message = text.rpartition("error: ")[2] if "error: " in text else (text.splitlines() or [""])[-1]
    return f"{message.strip() or 'no message'} (exit code {code}, log in {one.log})"
