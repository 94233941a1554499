"""Progress for programs and for people."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from fedgraft.report.progress import SHOWN_LOSSES, Bars, Lines, Phase, Quiet


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
    assert said == ["training   0/6", "training   3/6  left 0:06  round 3 [ada] Åsa", "training   6/6  round 6 [ada] Åsa"]


def test_verbose_lines_have_every_step(clock):
    said = []
    lines = Lines(said.append, verbose=True)
    lines.begin("training", 3)
    for client in ("ada", "bo", "cy"):
        clock[0] += 1.0
        lines.part(client, f"round 1  {client}", 1, 2, 2.5)
        clock[0] += 1.0
        lines.step(f"round 1  {client}")
    assert [line.split()[-1] for line in said] == ["0/3", "ada", "bo", "cy"]


def test_a_long_step_is_seen_to_move_and_shortens_the_time_left(clock):
    """A quarter of the first of two steps took 600 s: 4200 s are left. At the second half of the second step, 1 of 4 quarters of 600 s."""
    said = []
    lines = Lines(said.append)
    lines.begin("training", 2)
    clock[0] += 600.0
    lines.part("ada", "round 1  ada", 1, 4, 2.3456)
    clock[0] += 1800.0
    lines.step("round 1  ada")
    clock[0] += 1800.0
    lines.part("bo", "round 1  bo", 3_000, 4_000, note="model personal")
    assert said[1:] == [
        "training   0/2  left 1:10:00  round 1  ada  1/4  loss 2.346",
        "training   1/2  left 40:00  round 1  ada",
        "training   1/2  left 10:00  round 1  bo  model personal  3,000/4,000",
    ]


def test_more_parts_than_were_said_do_not_end_a_step(clock):
    phase = Phase("selection", 2)
    clock[0] += 8.0
    for share in (0.5, 1.5):
        phase.advance(share)
    assert (phase.done, phase.left()) == (1.0, "0:08")


def test_warnings_are_lines_of_their_own(clock):
    said = []
    Lines(said.append).warn("ada stopped")
    assert said == ["warning: ada stopped"]


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


def test_bars_show_the_step_in_hand_and_the_latest_losses():
    sink = io.StringIO()
    bars = Bars(Console(file=sink, force_terminal=True, width=120))
    bars.begin("training", 16)
    for number in range(8):
        bars.part(f"c{number} [x]", f"round 1  c{number} [x]", 1, 2, 1.0 + number)
        bars.part("c0 [x]", "round 1  c0 [x]", 1, 2, 0.5)
        bars.step()
    bars.part("c7 [x]", "round 2  c7 [x]", 3, 5, 7.5, "warm")
    bars.close()
    drawn = sink.getvalue()
    assert "round 2  c7 [x]  warm  3/5  loss 7.500" in drawn
    assert "8/16" in drawn
    last = drawn.rpartition("losses")[2].replace("\x1b[0m", " ")
    assert [word for word in last.split() if "." in word][:SHOWN_LOSSES] == ["4.000", "5.000", "6.000", "7.000", "0.500", "7.500"]


def test_verbose_bars_keep_a_line_per_step():
    sinks = {}
    for verbose in (False, True):
        sinks[verbose] = io.StringIO()
        bars = Bars(Console(file=sinks[verbose], force_terminal=True, width=100), verbose)
        bars.begin("training", 2)
        for name in ("ada [x]", "bo"):
            bars.step(f"round 1  {name}")
        bars.warn("[cy] stopped")
        bars.close()
    assert "training   round 1  ada [x]" in sinks[True].getvalue()
    assert "training   round 1  ada [x]" not in sinks[False].getvalue()
    assert all("warning: [cy] stopped" in sink.getvalue() for sink in sinks.values())


def test_bars_leave_the_terminal_alone_until_a_phase_begins():
    """Whoever waits for the imports draws a spinner of its own, and rich allows one live display."""
    console = Console(file=io.StringIO(), force_terminal=True)
    bars = Bars(console)
    with console.status("starting"):
        bars.close()
    assert "starting" in console.file.getvalue()


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
    quiet.part("ada", "ada", 1, 2)
    quiet.step("note")
    quiet.warn("no")
    quiet.close()
    assert capfd.readouterr() == ("", "")
