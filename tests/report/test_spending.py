"""`cost.json`: what each session of a run took."""

from __future__ import annotations

import json
import logging
import resource
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedgraft.report import spending
from fedgraft.report.spending import Spending, peaks

COMPUTE = {"base": 10, "grafted": 13, "adapters": 1, "graft": 2}
ACCOUNT = {"parameters": 100, "trained": 7, "shared": {"places": {"attention": 4}}, "personal": {"places": {"side": 3}}, "compute": COMPUTE}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr(spending.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def stands(make, monkeypatch):
    """Where the run stands when a session ends: call it with the rounds that are done."""

    def at(done, **parts):
        monkeypatch.setattr(spending.Record, "load", staticmethod(lambda _: replace(make(done=done), **parts)))

    return at


def session(folder: Path, clock: list[float], **phases: float) -> None:
    spent = Spending()
    for phase, seconds in phases.items():
        spent.begin(phase)
        clock[0] += seconds
    spent.keep(folder, ACCOUNT)


def sessions(folder: Path) -> list[dict]:
    return json.loads((folder / "cost.json").read_text())["sessions"]


def test_seconds_are_counted_by_phase(tmp_path, clock, stands):
    stands(3)
    spent = Spending()
    clock[0] += 50  # before the first phase nothing is counted
    for phase, seconds in (("loading", 2.0), ("training", 5.0), ("finishing", 1.0), ("training", 0.25)):
        spent.begin(phase)
        clock[0] += seconds
    spent.keep(tmp_path, ACCOUNT)
    (only,) = sessions(tmp_path)
    assert only["seconds"] == {"loading": 2.0, "training": 5.25, "finishing": 1.0}
    assert (only["rounds"], only["finished"]) == (3, True)


def test_the_account_is_told_in_a_few_numbers(tmp_path, clock, stands):
    stands(3)
    session(tmp_path, clock, loading=1.0)
    document = json.loads((tmp_path / "cost.json").read_text())
    assert document["schema"] == 1
    assert document["account"] == {
        "parameters": 100,
        "trained": 7,
        "shared": 4,
        "personal": 3,
        "flops_base": 10,
        "flops_grafted": 13,
        "flops_adapters": 1,
        "flops_graft": 2,
    }


def test_a_resumed_run_adds_a_session(tmp_path, clock, stands):
    stands(1)
    session(tmp_path, clock, loading=1.0, training=4.0)
    session(tmp_path, clock, loading=1.0)  # a second stop before another round was done
    stands(3)
    session(tmp_path, clock, loading=1.0, training=8.0, evaluation=2.0)
    assert [(one["rounds"], one["finished"], sum(one["seconds"].values())) for one in sessions(tmp_path)] == [
        (1, False, 5.0),
        (1, False, 1.0),
        (3, True, 11.0),
    ]


def test_evaluating_a_finished_run_again_adds_none_but_extending_it_does(tmp_path, clock, stands, make):
    stands(3)
    session(tmp_path, clock, training=4.0, evaluation=1.0)
    before = (tmp_path / "cost.json").read_bytes()
    session(tmp_path, clock, evaluation=1.0)
    assert (tmp_path / "cost.json").read_bytes() == before
    stands(3, rounds=make(rounds=5).rounds)
    session(tmp_path, clock, training=2.0, evaluation=1.0)
    assert [one["rounds"] for one in sessions(tmp_path)] == [3, 5]


def test_memory_is_the_peak_of_this_process():
    told = peaks()["peak_memory"]
    known = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert told == pytest.approx(known, rel=0.05)


def test_what_the_system_does_not_tell_is_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(spending, "LINUX", tmp_path / "nowhere")
    assert peaks() == {}
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t     2048 kB\nVmRSS:\t 1 kB\n")
    monkeypatch.setattr(spending, "LINUX", status)
    assert peaks() == {"peak_memory": 2048 * 1024}


@pytest.mark.parametrize(("error", "told"), [(OSError("no space left"), "no space left"), (KeyboardInterrupt(), "KeyboardInterrupt")])
def test_a_write_that_fails_is_logged_and_nothing_else(tmp_path, clock, stands, monkeypatch, caplog, error, told):
    def failing(*_):
        raise error

    stands(3)
    monkeypatch.setattr(spending, "write_document", failing)
    with caplog.at_level(logging.WARNING):
        session(tmp_path, clock, loading=1.0)
    assert f"cost.json was not written ({told}); the run itself is not affected" in caplog.text


def test_a_damaged_file_is_left_as_it_is(tmp_path, clock, stands, caplog):
    stands(3)
    (tmp_path / "cost.json").write_text("{")
    session(tmp_path, clock, loading=1.0)
    assert "damaged" in caplog.text
    assert (tmp_path / "cost.json").read_text() == "{"
