"""Progress for programs and for people."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from fedgraft.report.progress import Bars, Lines, Quiet


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_lines_at_the_start_at_the_end_and_rarely_between(clock):
    said = []
    lines = Lines(said.append, every=5.0)
    lines.begin("training", 6)
    for number in range(1, 7):
        clock[0] += 2.0
        lines.step(f"round {number} [ada] Åsa")
    lines.close()
    assert said == ["training   0/6", "training   3/6  round 3 [ada] Åsa", "training   6/6  round 6 [ada] Åsa"]


def test_a_new_phase_counts_anew(clock):
    said = []
    lines = Lines(said.append)
    for phase in ("selection", "training"):
        lines.begin(phase, 1)
        lines.step()
    assert [line.split() for line in said] == [["selection", "0/1"], ["selection", "1/1"], ["training", "0/1"], ["training", "1/1"]]


def test_bars_show_phase_count_and_note():
    sink = io.StringIO()
    bars = Bars(Console(file=sink, force_terminal=True, width=100))
    bars.begin("training", 2)
    bars.step("round 1  ada [x]  loss 2.345")
    bars.step("round 1  ben [/x]  loss 2.111")
    bars.close()
    for words in ("training", "2/2", "ben [/x]  loss 2.111"):
        assert words in sink.getvalue()


def test_rows_worth_reading_are_told_in_full():
    said, sink = [], io.StringIO()
    bars = Bars(Console(file=sink, width=40))
    for progress in (Lines(said.append), bars):
        progress.tell([("travels", "nine parameters [bold], 37.7 MB each way"), ("stays", "nothing")])
        progress.close()
    assert said == ["travels    nine parameters [bold], 37.7 MB each way", "stays      nothing"]
    assert [line.rstrip() for line in sink.getvalue().splitlines() if line.strip()][:3] == [
        "travels    nine parameters [bold],",
        "           37.7 MB each way",
        "stays      nothing",
    ]


def test_quiet_says_nothing(capfd):
    quiet = Quiet()
    quiet.begin("training", 2)
    quiet.step("note")
    quiet.tell([("label", "text")])
    quiet.close()
    assert capfd.readouterr() == ("", "")
