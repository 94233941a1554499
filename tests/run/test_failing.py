"""A client whose loss becomes NaN: it is stopped and named, keeps its memory, and the run goes on with the others."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fedgraft.bundle import Bundle
from fedgraft.report.progress import Quiet
from fedgraft.report.record import Record
from fedgraft.runner import resume, run
from fedgraft.training.client import Client
from fedgraft.trouble import Stopped

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in Click:DeprecationWarning")
LEAN = {"training": {"steps": 1}, "selection": {"tokens": 32}, "evaluation": {"rows": 1, "generate": False, "models": ["personal"]}}
REASON = "client 'garden', round 2: the loss became nan (gradient norm nan); lower training.lr, or check the data and the base model"


class Watch(Quiet):
    """Keeps warnings and the number of steps; stops at the n-th training step."""

    def __init__(self, stop: int = 0) -> None:
        self.warnings: list[str] = []
        self.steps: dict[str, int] = {}
        self.totals: dict[str, int] = {}
        self.phase, self.stop = "", stop

    def begin(self, phase: str, total: int) -> None:
        self.phase = phase
        self.totals[phase] = total

    def step(self, note: str = "") -> None:
        self.steps[self.phase] = self.steps.get(self.phase, 0) + 1
        if self.phase == "training" and self.steps[self.phase] == self.stop:
            raise KeyboardInterrupt

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def poison(monkeypatch):
    """`poison(names)`: these clients start round 1 (the second) from NaN."""

    def infect(*names: str) -> None:
        fit = Client.fit

        def poisoned(self: Client, trained: Mapping[str, Tensor], *, round_number: int, **options: Any) -> Any:
            if self.name in names and round_number == 1:
                trained = {key: torch.full_like(leaf, math.nan) for key, leaf in trained.items()}
            return fit(self, trained, round_number=round_number, **options)

        monkeypatch.setattr(Client, "fit", poisoned)

    return infect


def memories(folder, client):
    return {path.name: path.read_bytes() for path in (folder / "clients" / client).iterdir()}


def timeless(record: Record) -> list[dict[str, Any]]:
    return [{key: line.get(key) for key in ("round", "lr", "loss", "tokens", "bytes_down", "failed")} for line in record.rounds]


def test_the_others_go_on_and_the_client_keeps_its_memory(world, tmp_path, poison):
    once = run(world.recipe(**LEAN, federation={"rounds": 1}), out=tmp_path / "once").folder
    poison("garden")
    watch = Watch()
    record = run(world.recipe(**LEAN, federation={"rounds": 2}), out=tmp_path / "out", progress=watch)
    assert record.finished
    assert watch.warnings == [f"{REASON}. It sits this round out with the memory it had"]
    assert watch.steps == watch.totals
    assert [line.get("failed") for line in record.rounds] == [None, {"garden": REASON}]
    assert [sorted(line["clients"]) for line in record.rounds] == [["bakery", "garden", "harbour"], ["bakery", "harbour"]]
    newest = max(memories(tmp_path / "out", "garden"))
    assert (
        Bundle.load(tmp_path / "out" / "clients" / "garden" / newest).digest()
        == Bundle.load(max((once / "clients" / "garden").iterdir())).digest()
    )
    assert math.isfinite(record.results["garden"]["personal"]["loss"])


def test_interrupted_around_the_failure_and_resumed_is_uninterrupted(world, tmp_path, poison):
    poison("garden")
    recipe = world.recipe(**LEAN, federation={"rounds": 3})
    whole = run(recipe, out=tmp_path / "whole")
    for step in (4, 5, 6, 7):  # before the failure, at it, after it in its round, and in the next one
        with pytest.raises(Stopped):
            run(recipe, out=tmp_path / f"cut{step}", progress=Watch(step))
        resumed = resume(tmp_path / f"cut{step}")
        assert resumed.digest == whole.digest
        assert timeless(resumed) == timeless(whole)


def test_a_round_in_which_all_fail_stops_the_run_and_loses_nothing(world, tmp_path, poison, command, monkeypatch):
    file, out = world.write(tmp_path / "recipe.yaml", **LEAN, federation={"rounds": 2}), tmp_path / "out"
    with monkeypatch.context():
        poison("garden", "bakery", "harbour")
        done = command("run", file, "--out", out, "--quiet")
    assert (done.code, done.out) == (2, "")
    told = done.err.splitlines()
    assert told[0] == "error: no client could train in round 2:"
    assert [line.split("'")[1] for line in told[1:4]] == ["bakery", "garden", "harbour"]
    assert told[4] == (
        f"Nothing is lost: the run stands at round 1 of 2, its settings are in {out / 'recipe.yaml'}; continue with: fedgraft resume {out}"
    )
    assert len((out / "rounds.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    monkeypatch.undo()  # the cause is gone
    whole = run(world.recipe(**LEAN, federation={"rounds": 2}), out=tmp_path / "whole")
    assert resume(out).digest == whole.digest


def test_versions_that_changed_are_warned_of_and_noted_once(world, tmp_path):
    folder = run(world.recipe(**LEAN, federation={"rounds": 1}), out=tmp_path / "out").folder
    path = folder / "environment.json"
    began = json.loads(path.read_text(encoding="utf-8"))
    older = began | {"packages": began["packages"] | {"torch": "2.0.1"}, "fedgraft": "0.0.9"}
    path.write_text(json.dumps(older), encoding="utf-8")
    watch = Watch()
    assert resume(folder, progress=watch).finished
    torch_now = began["packages"]["torch"]
    assert watch.warnings == [
        f"resumed with fedgraft 0.0.9 -> {began['fedgraft']}, torch 2.0.1 -> {torch_now}: "
        "the result need no longer be equal bit for bit to that of an uninterrupted run"
    ]
    noted = json.loads(path.read_text(encoding="utf-8"))
    (entry,) = noted.pop("resumptions")
    assert noted == older
    assert entry.keys() == {"date", "command", "fedgraft", "packages", "threads", "device"}
    assert entry["packages"] == began["packages"]
    again = Watch()
    resume(folder, progress=again)
    assert again.warnings == []
    assert len(json.loads(path.read_text(encoding="utf-8"))["resumptions"]) == 1
