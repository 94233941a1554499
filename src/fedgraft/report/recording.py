"""Telling recorders (TensorBoard, Weights & Biases, MLflow) what the run's own files say: every round once, then the results.

A recorder is told of a round after its commit. What it has been told stands in `told.json` of its folder below `track/`, written before it
is told: so no round comes twice, whatever kills the run; one that was being told in that moment may be missing there, never in
`rounds.jsonl`. A recorder that fails is left out with a warning and takes up what it missed when the run is resumed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fedgraft import plugins
from fedgraft.report.record import read_document, write_document
from fedgraft.report.settings import RecordSettings
from fedgraft.report.tail import Tail

FOLDER = "track"
TOLD = "told.json"
ROUND = ("loss", "lr", "seconds", "tokens", "bytes_down", "bytes_up")


@dataclass(frozen=True, kw_only=True)
class About:
    """What a recorder learns at its start."""

    folder: Path
    """Its own, `track/<name>` of the run folder; there."""
    run: str
    """The name of the run folder."""
    project: str
    recipe: dict[str, Any]
    """Section -> key -> value, complete."""
    first: int
    """The round that comes next; above 0 when a run is continued."""


class Recorder(Protocol):
    """What a plug-in's `start` returns."""

    def note(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures by name at a step: the number of a round from 0 on, for results the number of rounds."""

    def close(self) -> None:
        """Nothing more comes; all is on the disk afterwards."""


def check(settings: RecordSettings) -> None:
    """Refuse what would fail only after training.

    Raises:
        ValueError: unknown recorder, or its package is not installed.
    """
    for name in settings.to:
        package = plugins.load("recorder", name).PACKAGE
        spec = find_spec(package)
        if spec is None or spec.origin is None:  # without: a folder of that name where Python happens to run
            raise ValueError(f"record.to: {name} needs the package {package}, which is not installed; pip install 'fedgraft[track]'")


@contextmanager
def recording(settings: RecordSettings, folder: Path, recipe: dict[str, Any], warn: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """A function that tells all recorders what the run folder has that they don't know yet; called once at the start."""
    started = [_Told(name, settings.project, folder, recipe, warn) for name in settings.to]
    rounds = Tail(folder / "rounds.jsonl")

    def tell() -> None:
        if started:
            lines, results = rounds.look(), read_document(folder / "results.json")
            for one in started:
                one.tell(lines, results)

    tell()
    try:
        yield tell
    finally:
        for one in started:
            one.close()


class _Told:
    """One recorder and what it has been told; none after a failure."""

    def __init__(self, name: str, project: str, folder: Path, recipe: dict[str, Any], warn: Callable[[str], None]) -> None:
        self.name, self.warn, self.recorder = name, warn, None
        self.place = folder / FOLDER / name
        self.rounds, self.results = 0, 0
        """Rounds told; rounds that the results told are of."""
        with self._careful():
            document = read_document(self.place / TOLD)
            self.rounds, self.results = document.get("rounds", 0), document.get("results", 0)
            self.place.mkdir(parents=True, exist_ok=True)
            about = About(folder=self.place, run=folder.resolve().name, project=project, recipe=recipe, first=self.rounds)
            self.recorder = plugins.load("recorder", name).start(about)

    def tell(self, lines: list[dict[str, Any]], results: dict[str, Any]) -> None:
        """The rounds from where it stands, and the results where they are of another number of rounds than those told."""
        for line in lines[self.rounds :]:
            self._note(line["round"], round_figures(line), rounds=line["round"] + 1, results=self.results)
        if results and results["rounds"] == len(lines) != self.results:
            self._note(len(lines), result_figures(results["clients"]), rounds=self.rounds, results=len(lines))

    def close(self) -> None:
        """Let it write what it still holds."""
        with self._careful():
            if self.recorder is not None:
                self.recorder.close()

    def _note(self, step: int, figures: Mapping[str, float], rounds: int, results: int) -> None:
        with self._careful():
            if self.recorder is not None:
                write_document(self.place / TOLD, {"rounds": rounds, "results": results})
                self.rounds, self.results = rounds, results
                self.recorder.note(step, figures)

    @contextmanager
    def _careful(self) -> Iterator[None]:
        """The run goes on whatever a recorder does."""
        try:
            yield
        except Exception as error:
            self.recorder = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self.warn(f"{self.name} records no more ({reason}); the run goes on, and its own files have everything")


def round_figures(line: dict[str, Any]) -> dict[str, float]:
    """A line of `rounds.jsonl` as figures by name: the round's own, and `loss/<client>`."""
    figures = {name: float(line[name]) for name in ROUND if line.get(name) is not None}
    return figures | {f"loss/{client}": facts["loss"] for client, facts in line["clients"].items() if "loss" in facts}


def result_figures(clients: dict[str, Any]) -> dict[str, float]:
    """`results.json` as figures by name: `final/<model>/<figure>`, the mean over clients, and each client's below it."""
    gathered: dict[str, dict[str, float]] = {}
    for client, models in clients.items():
        for model, figures in models.items():
            for figure, value in figures.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    gathered.setdefault(f"final/{model}/{figure}", {})[client] = float(value)
    found: dict[str, float] = {}
    for name, values in gathered.items():
        found |= {name: statistics.fmean(values.values()), **{f"{name}/{client}": value for client, value in values.items()}}
    return found


def flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's keys as `section.key`, lists as text."""
    found: dict[str, Any] = {}
    for section, values in recipe.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            found[f"{section}.{key}" if key else section] = value if isinstance(value, int | float | str | bool) else str(value)
    return found
