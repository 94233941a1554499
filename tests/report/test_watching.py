"""A run seen from outside: what its folder says, whatever is half-written, gone or resumed meanwhile."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import sys
import time

import pytest
from rich.console import Console

from fedgraft import files
from fedgraft.cli.watch_screen import BLOCKS, draw, sparkline
from fedgraft.report.now import FILE, Noting, noting
from fedgraft.report.progress import Quiet
from fedgraft.report.record import write_document, write_recipe
from fedgraft.report.watching import SILENCE, Watched, WatchedSweep, find

RECIPE = {"method": {"name": "flex"}, "federation": {"rounds": 4}, "seed": 1}


def line(number, **clients):
    told = {name: {"loss": loss} for name, loss in clients.items()}
    mean = sum(clients.values()) / len(clients) if clients else None
    return {"round": number, "loss": mean, "seconds": 8.0, "bytes_up": 10, "bytes_down": 20, "clients": told}


def begin(folder, *lines, **note):
    """A run folder with these rounds, and a note of this process."""
    write_recipe(folder / "recipe.yaml", RECIPE)
    for one in lines:
        files.append_line(folder / "rounds.jsonl", one)
    if note:
        facts = {"state": "running", "phase": "training", "done": 1.5, "total": 8, "title": "round 1  ada  3/7", "loss": 2.5}
        facts |= {"time": time.time(), "process": os.getpid(), "host": platform.node(), **note}
        (folder / FILE).write_text(json.dumps(facts), encoding="utf-8")
    return folder


def drawn(views, width=100, height=30, encoding="utf-8"):
    sink = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    terminal = Console(file=sink, width=width, height=height, force_terminal=True, color_system=None, legacy_windows=False)
    terminal.print(draw(views, terminal))
    sink.flush()
    return sink.buffer.getvalue().decode(encoding)


def test_a_run_at_work(tmp_path):
    folder = begin(tmp_path / "run", line(0, ada=3.0, bo=4.0), line(1, ada=2.0), state="running")
    written = time.time() - 3
    os.utime(folder / "rounds.jsonl", (written, written))
    view = Watched(folder).look()
    assert (view.state, view.method, view.done, view.planned) == ("running", "flex", 2, 4)
    assert view.now == "training  1/8  round 1  ada  3/7  loss 2.500"
    assert view.left == pytest.approx(2 * 8.0 - 3, abs=1)
    assert (view.mean, view.losses) == ([3.5, 2.0], {"ada": [3.0, 2.0], "bo": [4.0]})
    assert (view.bytes_up, view.bytes_down) == (20, 40)
    frame = drawn(view)
    for words in ("running", "2/4", "about 13 s of training", "round 1  ada", "20 B up, 40 B down", f"ada     {BLOCKS[7]}{BLOCKS[0]}"):
        assert words in frame


def test_a_look_reads_only_what_is_new(tmp_path, monkeypatch):
    run = Watched(begin(tmp_path / "run", line(0, ada=3.0)))
    run.look()
    parsed = []
    monkeypatch.setattr("fedgraft.report.tail.parse_json", lambda text: parsed.append(text) or json.JSONDecoder().decode(text.decode()))
    run.look()
    assert [text for text in parsed if text] == []
    with (tmp_path / "run" / "rounds.jsonl").open("ab") as rounds:
        rounds.write(json.dumps(line(1, ada=1.0)).encode()[:20])  # half of it is there
    assert run.look().done == 1
    with (tmp_path / "run" / "rounds.jsonl").open("ab") as rounds:
        rounds.write(json.dumps(line(1, ada=1.0)).encode()[20:] + b"\n")
    assert run.look().losses == {"ada": [3.0, 1.0]}
    assert len([text for text in parsed if text]) == 1


def test_a_resume_that_drops_a_round_starts_the_sums_anew(tmp_path):
    folder = begin(tmp_path / "run", line(0, ada=3.0), line(1, ada=2.0))
    run = Watched(folder)
    assert run.look().done == 2
    files.write_text(folder / "rounds.jsonl", json.dumps(line(0, ada=3.0)) + "\n")
    view = run.look()
    assert (view.done, view.bytes_up, view.losses) == (1, 10, {"ada": [3.0]})


def test_how_a_run_can_stand(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    notes = {
        "stopped": {"state": "stopped"},
        "failed": {"state": "failed: no room"},
        "killed": {"process": gone.pid, "state": "running"},
        "running": {"host": "another", "process": 1},
        "unknown": {"host": "another", "time": time.time() - SILENCE - 1},
    }
    for state, note in notes.items():
        view = Watched(begin(tmp_path / state, line(0, ada=3.0), **note)).look()
        assert view.state == state
        assert view.reason == ("no room" if state == "failed" else "")
        if state not in {"running", "unknown"}:
            assert f"fedgraft resume {tmp_path / state}" in drawn(view, width=300)
    assert Watched(begin(tmp_path / "old", line(0, ada=3.0))).look().state == "unknown"  # by a version that left no note


def test_a_process_of_that_number_that_began_later_is_another(tmp_path):
    assert Watched(begin(tmp_path / "run", time=time.time() - 10**7)).look().state == "killed"


def test_half_a_note_is_not_believed(tmp_path):
    folder = begin(tmp_path / "run", state="running")
    run = Watched(folder)
    assert run.look().state == "running"
    (folder / FILE).write_text('{"state": "fai', encoding="utf-8")
    assert run.look().state == "running"


def test_a_finished_run_and_its_extension(tmp_path):
    folder = begin(tmp_path / "run", *(line(number, ada=3.0 - number / 10) for number in range(4)))
    figures = {model: {"loss": loss} for model, loss in (("base", 4.0), ("personal", 3.0))}
    write_document(folder / "results.json", {"rounds": 4, "split": "test", "clients": {"ada": figures}})
    files.write_text(folder / "digest.txt", "abc\n")
    run = Watched(folder)
    view = run.look()
    assert (view.state, view.left) == ("finished", None)
    assert view.results == {"response loss (nats/token)": {"base": 4.0, "personal": 3.0}}
    assert "base 4.000, personal 3.000" in drawn(view)
    later = {**RECIPE, "federation": {"rounds": 6}}
    write_recipe(folder / "recipe.yaml", later)
    os.utime(folder / "recipe.yaml", (time.time() + 5, time.time() + 5))  # however coarse the clock of the file system
    assert (run.look().state, run.view.planned) == ("unknown", 6)


def test_waiting_for_a_folder_and_after_it_is_gone(tmp_path):
    folder = tmp_path / "run"
    assert find(folder) is None
    folder.mkdir()
    (folder / files.LOCK).touch()
    assert find(folder) is None
    run = find(begin(folder, line(0, ada=3.0)))
    assert isinstance(run, Watched)
    assert run.look().done == 1
    for path in folder.iterdir():
        path.unlink()
    assert (run.look().state, run.view.done) == ("waiting", 0)
    (tmp_path / "letter.txt").write_text("mine")
    for other in (tmp_path, tmp_path / "letter.txt"):
        with pytest.raises(ValueError, match="neither a run nor a sweep"):
            find(other)


def test_a_sweep_shows_every_point(tmp_path):
    points = [{"name": name, "settings": {}, "recipe": {}, "failure": "no room (exit code 2)" if name == "c" else ""} for name in "abcd"]
    write_document(tmp_path / "sweep.json", {"points": points})
    begin(tmp_path / "a", line(0, ada=3.0), state="running")
    begin(tmp_path / "c", line(0, ada=3.0), state="failed: no room")
    write_document(
        begin(tmp_path / "b", *(line(number, ada=3.0) for number in range(4))) / "results.json",
        {"rounds": 4, "split": "test", "clients": {"ada": {"personal": {"loss": 1.0}}}},
    )
    files.write_text(tmp_path / "b" / "digest.txt", "abc\n")
    sweep = find(tmp_path)
    assert isinstance(sweep, WatchedSweep)
    views = sweep.look()
    assert [(view.folder.name, view.state) for view in views] == [("a", "running"), ("b", "finished"), ("c", "failed"), ("d", "waiting")]
    assert views[2].reason == "no room (exit code 2)"
    frame = drawn(views)
    assert "1 of 4 runs finished" in frame
    assert "and 1 more" in (short := drawn(views, height=8))
    assert "waiting" not in short  # those at work, or in trouble, come first


def test_many_clients_fit_the_terminal_and_a_plain_one_gets_plain_letters(tmp_path):
    view = Watched(begin(tmp_path / "run", line(0, **{f"client-{at:03}": 2.0 for at in range(200)}), state="running")).look()
    frame = drawn(view, height=24)
    assert len(frame.splitlines()) <= 24
    assert "and 187 more" in frame
    assert drawn(view, height=24, encoding="ascii").isascii()


def test_sparklines():
    assert sparkline([]) == sparkline([float("nan")]) == ""
    assert sparkline([1.0, 1.0]) == BLOCKS[0] * 2
    assert sparkline([0, 7, 3, float("nan"), 5]) == "▁█▄▆"
    assert sparkline([0, 2, 4, 6, 14, 14], width=3) == "▁▃█"  # means 1, 5, 14; (5 - 1) / 13 of seven steps is 2
    assert len(sparkline(list(range(1000)), width=30)) == 30


class Counting(Quiet):
    """Says nothing, hears everything."""

    def __init__(self):
        self.heard = []

    def part(self, *words, **more):
        self.heard.append("part")

    def step(self, note=""):
        self.heard.append(note)


def test_the_note_is_written_now_and_then_and_says_how_it_ended(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("fedgraft.report.now.time.monotonic", lambda: clock[0])
    progress = Counting()

    def note():
        return json.loads((tmp_path / FILE).read_text(encoding="utf-8"))

    def work(noted):
        assert (note()["state"], note()["phase"], note()["process"]) == ("running", "starting", os.getpid())
        noted.begin("training", 2)
        for done in (1, 2, 3):
            clock[0] += 0.6
            noted.part("ada", "round 1  ada", done, 4, loss=float(done))
        assert (note()["done"], note()["loss"]) == (0.5, 2.0)  # a second after the last
        noted.step("bo")
        raise ValueError("out of\nmemory")

    with pytest.raises(ValueError, match="out of"), noting(progress, tmp_path) as noted:
        work(noted)
    assert note()["state"] == "failed: out of memory"
    assert progress.heard == ["part", "part", "part", "bo"]
    with pytest.raises(KeyboardInterrupt), noting(progress, tmp_path):
        raise KeyboardInterrupt
    assert note()["state"] == "stopped"
    with noting(progress, tmp_path):
        pass
    assert not (tmp_path / FILE).exists()


def test_a_note_that_cannot_be_written_is_not_missed(tmp_path):
    Noting(Quiet(), tmp_path / "nowhere").begin("training", 3)
