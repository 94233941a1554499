"""A run folder seen from outside, at every stage of a run that is written by hand."""

from __future__ import annotations

import json
import os
import platform
import time

import pytest

from fedgraft.cli.watch_screen import sparkline
from fedgraft.report import watching
from fedgraft.report.now import FILE
from fedgraft.report.record import SWEEP, write_document, write_recipe
from fedgraft.report.watching import Watched, WatchedSweep, find

GONE = 2**22 + 1  # above the largest process number of Linux


def begin(folder, rounds=3):
    folder.mkdir(parents=True)
    write_recipe(folder / "recipe.yaml", {"method": {"name": "flex"}, "federation": {"rounds": rounds}})


def add_round(folder, number, losses, seconds=2.0, end="\n"):
    clients = {client: {"loss": loss} for client, loss in losses.items()}
    mean = sum(losses.values()) / len(losses)
    line = {"round": number, "loss": mean, "seconds": seconds, "bytes_up": 10, "bytes_down": 20, "clients": clients}
    with (folder / "rounds.jsonl").open("a", encoding="utf-8") as sink:
        sink.write(json.dumps(line) + end)


def note(folder, state="running", **facts):
    known = {"state": state, "phase": "training", "done": 1, "total": 6, "title": "ada", "loss": 3.25}
    known |= {"time": time.time(), "process": os.getpid(), "host": platform.node()} | facts
    (folder / FILE).write_text(json.dumps(known), encoding="utf-8")


def finish(folder, rounds):
    figures = {"loss": 3.0, "token_accuracy": 0.5, "rows": 1}
    write_document(folder / "environment.json", {})
    (folder / "digest.txt").write_text("0" * 64 + "\n", encoding="utf-8")
    write_document(folder / "results.json", {"rounds": rounds, "split": "test", "clients": {"ada": {"personal": figures}}})


def test_a_run_from_its_first_round_to_its_end(tmp_path):
    folder = tmp_path / "run"
    assert find(folder) is None
    begin(folder)
    run = find(folder)
    assert isinstance(run, Watched)
    note(folder)
    add_round(folder, 0, {"ada": 4.0, "bo": 2.0})
    view = run.look()
    assert (view.state, view.method, view.done, view.planned) == ("running", "flex", 1, 3)
    assert view.now == "training  1/6  ada  loss 3.250"
    assert view.left == pytest.approx(4.0, abs=2.0)  # two rounds of two seconds, less what of the next has passed
    add_round(folder, 1, {"bo": 1.0})
    add_round(folder, 2, {"ada": 3.0}, end="")  # half a line
    view = run.look()
    assert (view.done, view.mean) == (2, [3.0, 1.0])
    assert view.losses == {"ada": [4.0], "bo": [2.0, 1.0]}
    assert (view.bytes_up, view.bytes_down) == (20, 40)
    with (folder / "rounds.jsonl").open("a", encoding="utf-8") as sink:
        sink.write("\n")
    finish(folder, rounds=3)
    (folder / FILE).unlink()
    view = run.look()
    assert (view.state, view.done, view.left) == ("finished", 3, None)
    assert view.results["response loss (nats/token)"] == {"personal": 3.0}


@pytest.mark.parametrize(
    ("facts", "state", "reason"),
    [
        ({"process": GONE}, "killed", ""),
        ({"state": "stopped"}, "stopped", ""),
        ({"state": "failed: no rows: add some"}, "failed", "no rows: add some"),
        ({"host": "elsewhere"}, "running", ""),
        ({"host": "elsewhere", "time": 0.0}, "unknown", ""),
    ],
)
def test_how_a_run_ended_is_told(tmp_path, facts, state, reason):
    begin(tmp_path / "run")
    note(tmp_path / "run", **facts)
    view = Watched(tmp_path / "run").look()
    assert (view.state, view.reason) == (state, reason)


def test_results_of_fewer_rounds_are_those_of_before_the_extension(tmp_path):
    begin(tmp_path / "run", rounds=4)
    finish(tmp_path / "run", rounds=3)
    note(tmp_path / "run", state="stopped")
    assert Watched(tmp_path / "run").look().state == "stopped"


def test_a_resume_that_drops_rounds_starts_the_curve_anew(tmp_path):
    folder = tmp_path / "run"
    begin(folder)
    for number in range(2):
        add_round(folder, number, {"ada": 4.0 - number})
    run = Watched(folder)
    assert run.look().mean == [4.0, 3.0]
    (folder / "rounds.jsonl").unlink()
    add_round(folder, 0, {"ada": 4.0})
    view = run.look()
    assert (view.mean, view.done, view.bytes_up) == ([4.0], 1, 10)


def test_a_look_reads_new_lines_only(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    begin(folder)
    add_round(folder, 0, {"ada": 4.0})
    run, read = Watched(folder), []
    monkeypatch.setattr(
        "fedgraft.report.tail._parsed", lambda line: read.append(line) if not line else read.append(line) or json.loads(line)
    )
    run.look()
    run.look()
    add_round(folder, 1, {"ada": 3.0})
    run.look()
    assert [json.loads(line)["round"] for line in read if line] == [0, 1]


def test_a_half_written_note_keeps_the_last_one(tmp_path):
    folder = tmp_path / "run"
    begin(folder)
    note(folder)
    run = Watched(folder)
    before = run.look().now
    (folder / FILE).write_text('{"state": "run', encoding="utf-8")
    assert run.look().now == before != ""


def test_a_sweep_in_its_order_with_its_failures(tmp_path):
    points = [{"name": "b", "failure": ""}, {"name": "a", "failure": "no such file"}, {"name": "c", "failure": ""}]
    (tmp_path / "grid").mkdir()
    write_document(tmp_path / "grid" / SWEEP, {"points": points})
    for name in ("a", "b"):
        begin(tmp_path / "grid" / name)
    finish(tmp_path / "grid" / "b", rounds=3)
    sweep = find(tmp_path / "grid")
    assert isinstance(sweep, WatchedSweep)
    assert [(view.folder.name, view.state, view.reason) for view in sweep.look()] == [
        ("b", "finished", ""),
        ("a", "failed", "no such file"),
        ("c", "waiting", ""),
    ]


def test_another_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="neither a run nor a sweep"):
        find(tmp_path)


def test_curves_lie_between_their_own_bounds():
    assert sparkline([1.0, 2.0, 3.0]) == "▁▅█"  # the middle of levels 0 to 7 rounds to 4
    assert sparkline([2.0, 2.0], plain=True) == "__"
    assert sparkline([float(number) for number in range(100)], width=10, plain=True)[:1] == "_"
    assert len(sparkline([float(number) for number in range(100)], width=10)) == 10
    assert sparkline([float("nan")]) == sparkline([]) == ""


def test_silence_on_another_machine_is_not_taken_for_work(tmp_path):
    assert watching._alive({"host": "elsewhere", "time": time.time() - watching.SILENCE - 1}) is None
