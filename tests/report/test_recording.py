"""Recorders hear of every round once, and nothing they do touches a run."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from fedgraft import files, plugins
from fedgraft.recipe import load_recipe
from fedgraft.report.record import write_document
from fedgraft.report.recording import About, check, flat, recording, result_figures, round_figures
from fedgraft.report.settings import RecordSettings
from fedgraft.report.tail import Tail


def line(number, **further):
    clients = {"ada": {"loss": 2.0 + number, "tokens": 5}, "bo": {"tokens": 4}}
    return {
        "round": number,
        "lr": 0.1,
        "loss": 2.0 + number,
        "seconds": 1,
        "tokens": 9,
        "bytes_down": 10,
        "bytes_up": 20,
        "clients": clients,
        **further,
    }


class Heard:
    """A recorder that keeps what it is told; fails at the steps in `failing`."""

    PACKAGE = "json"

    def __init__(self):
        self.notes, self.starts, self.closed, self.failing = [], [], 0, set()

    def start(self, about):
        self.starts.append(about)
        return self

    def note(self, step, figures):
        if step in self.failing:
            raise RuntimeError("no network\nat all")
        self.notes.append((step, dict(figures)))

    def close(self):
        self.closed += 1


@pytest.fixture
def heard(monkeypatch):
    one = Heard()
    monkeypatch.setattr(plugins, "load", lambda kind, name: one)
    return one


def record(folder, warnings, *actions):
    """One process's part of a run: an action appends to the folder, then the recorders are told."""
    with recording(RecordSettings(to=("toy",)), folder, {"seed": 7}, warnings.append) as tell:
        for action in actions:
            action()
            tell()


def rounds(folder, *numbers):
    return [lambda number=number: files.append_line(folder / "rounds.jsonl", line(number)) for number in numbers]


def results(folder, number):
    figures = {"rows": 3, "loss": 1.5, "gate_mean": [[0.5]]}
    return lambda: write_document(folder / "results.json", {"rounds": number, "split": "test", "clients": {"ada": {"personal": figures}}})


def test_every_round_and_the_results_once_however_often_it_is_resumed(heard, tmp_path):
    warnings = []
    record(tmp_path, warnings, *rounds(tmp_path, 0, 1))
    record(tmp_path, warnings, *rounds(tmp_path, 2), results(tmp_path, 3), results(tmp_path, 3))
    record(tmp_path, warnings)
    record(tmp_path, warnings, *rounds(tmp_path, 3), results(tmp_path, 4))
    assert [step for step, _ in heard.notes] == [0, 1, 2, 3, 3, 4]
    assert heard.notes[1][1] == {
        "loss": 3.0,
        "lr": 0.1,
        "seconds": 1.0,
        "tokens": 9.0,
        "bytes_down": 10.0,
        "bytes_up": 20.0,
        "loss/ada": 3.0,
    }
    assert (
        heard.notes[3][1]
        == heard.notes[5][1]
        == {
            name: value
            for figure, value in (("rows", 3.0), ("loss", 1.5))
            for name in (f"final/personal/{figure}", f"final/personal/{figure}/ada")
        }
    )
    assert [about.first for about in heard.starts] == [0, 2, 3, 3]
    assert (heard.closed, warnings) == (4, [])


def test_a_recorder_that_fails_warns_once_and_catches_up_later(heard, tmp_path):
    warnings = []
    heard.failing = {1}
    record(tmp_path, warnings, *rounds(tmp_path, 0, 1, 2))
    assert warnings == ["toy records no more (no network at all); the run goes on, and its own files have everything"]
    assert [step for step, _ in heard.notes] == [0]
    heard.failing = set()
    record(tmp_path, warnings)
    assert [step for step, _ in heard.notes] == [0, 2]  # the round it failed at may have reached it, so it is not told again
    assert len(warnings) == 1


@pytest.mark.parametrize("part", ["start", "close"])
def test_no_failure_of_a_recorder_passes(heard, tmp_path, monkeypatch, part):
    def fail(*words):
        raise OSError("disk full")

    monkeypatch.setattr(heard, part, fail)
    warnings = []
    record(tmp_path, warnings, *rounds(tmp_path, 0))
    assert ["disk full" in warning for warning in warnings] == [True]


def test_ctrl_c_does_pass(heard, tmp_path, monkeypatch):
    def stop(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(heard, "note", stop)
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, [], *rounds(tmp_path, 0))
    assert heard.closed == 1


def test_without_recorders_nothing_is_written(tmp_path):
    with recording(RecordSettings(), tmp_path, {}, pytest.fail) as tell:
        tell()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_names_the_extra(monkeypatch):
    for spec in (None, SimpleNamespace(origin=None)):  # the second: a folder `wandb` where Python runs
        monkeypatch.setattr("fedgraft.report.recording.find_spec", lambda name, spec=spec: spec)
        with pytest.raises(ValueError, match=r"record.to: wandb needs the package wandb, .* pip install 'fedgraft\[track\]'"):
            check(RecordSettings(to=("wandb",)))
    check(RecordSettings())


def test_an_unknown_recorder_is_refused_with_the_recipe():
    with pytest.raises(ValueError, match=r"unknown recorder 'tensorbord' \(did you mean 'tensorboard'\?\)"):
        load_recipe({"record": {"to": ["tensorbord"]}})


def test_figures_are_numbers_by_name():
    assert "loss" not in round_figures(line(0, loss=None))
    two = {name: {"personal": {"loss": loss, "fine": True}} for name, loss in (("ada", 1.0), ("bo", 3.0))}
    assert result_figures(two) == {"final/personal/loss": 2.0, "final/personal/loss/ada": 1.0, "final/personal/loss/bo": 3.0}
    assert flat({"lora": {"rank": 4, "targets": ["q"]}, "seed": 1}) == {"lora.rank": 4, "lora.targets": "['q']", "seed": 1}


def test_a_tail_reads_whole_lines_once_and_starts_anew_with_another_file(tmp_path):
    path = tmp_path / "rounds.jsonl"
    tail = Tail(path)
    assert tail.look() == []
    path.write_bytes('{"a": 1}\nno json\n{"é'.encode()[:-1])  # half a character
    assert tail.look() == [{"a": 1}]
    with path.open("ab") as more:
        more.write('é": 2}\n'.encode()[1:])
    assert tail.look() == [{"a": 1}, {"é": 2}]
    files.write_text(path, '{"a": 3}\n{"a": 4}\n{"a": 5}\n{"a": 6}\n')  # a rename, as by a resume: longer, but another file
    assert [one["a"] for one in tail.look()] == [3, 4, 5, 6]
    os.truncate(path, 9)
    assert tail.look() == [{"a": 3}]
    path.unlink()
    assert tail.look() == []


def about(folder, first=0):
    folder.mkdir(exist_ok=True)
    return About(folder=folder, run="r", project="p", recipe={"lora": {"rank": 4}, "seed": 1}, first=first)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard: pip install 'fedgraft[track]'")
def test_tensorboard_reads_what_two_processes_told(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first in (0, 2):
        recorder = plugins.load("recorder", "tensorboard").start(about(tmp_path, first))
        for step in (first, first + 1):
            recorder.note(step, {"loss/a b": step / 2})
        recorder.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/a b")] == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5)]
    assert events.Tags()["tensors"] == ["recipe/text_summary"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow: pip install 'fedgraft[track]'")
def test_mlflow_keeps_one_run_over_two_processes(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for first in (0, 2):
        recorder = plugins.load("recorder", "mlflow").start(about(tmp_path, first))
        for step in (first, first + 1):
            recorder.note(step, {"loss/a,b": step / 2})
        recorder.close()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss/a_b")] == [
        (0, 0),
        (1, 0.5),
        (2, 1),
        (3, 1.5),
    ]
    assert (run.info.run_name, run.info.status, run.data.params) == ("r", "FINISHED", {"lora.rank": "4", "seed": "1"})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb: pip install 'fedgraft[track]'")
def test_wandb_writes_offline_parts_of_one_run(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for first in (0, 2):
        recorder = plugins.load("recorder", "wandb").start(about(tmp_path, first))
        recorder.note(first, {"loss": 0.5})
        recorder.close()
    parts = [path.read_bytes() for path in tmp_path.rglob("*.wandb")]
    names = {path.name for path in tmp_path.rglob("*.wandb")}
    assert len(names) == 1  # the same id, so that both are one run after `wandb sync`
    assert all(part.count(b"_timestamp") and part.count(b"loss") for part in parts)


def test_the_kept_facts_are_json(heard, tmp_path):
    record(tmp_path, [], *rounds(tmp_path, 0), results(tmp_path, 1))
    told = json.loads((tmp_path / "track" / "toy" / "told.json").read_text())
    assert (told["rounds"], told["results"]) == (1, 1)
