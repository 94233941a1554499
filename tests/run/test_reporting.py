"""What a run tells while it works, and how it ends when it is told to stop."""

from __future__ import annotations

import json
import os
import re
import signal
from statistics import fmean

import pytest

from fedgraft import files, hosting
from fedgraft.bundle import Bundle
from fedgraft.report.progress import Quiet
from fedgraft.report.record import resume_command
from fedgraft.runner import resume, run
from fedgraft.trouble import Stopped

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in Click:DeprecationWarning"),
    pytest.mark.skipif(os.name != "posix", reason="a process cannot send itself these signals elsewhere"),
]
LEAN = {"training": {"steps": 1}, "selection": {"tokens": 32}, "evaluation": {"rows": 1, "generate": False, "models": ["personal"]}}


class Listener(Quiet):
    """Keeps everything that is said of parts."""

    def __init__(self) -> None:
        self.phase, self.parts = "", {}

    def begin(self, phase, total):
        self.phase = phase

    def part(self, client, title, done, total, loss=None, note=""):
        self.parts.setdefault((self.phase, title, client), []).append((done, total, loss, note))


def test_every_long_step_tells_how_far_it_is_and_listening_changes_no_bit(world, finished, tmp_path):
    listener = Listener()
    record = run(world.recipe(), out=tmp_path / "out", progress=listener)
    assert record.digest == finished.digest
    assert record.results == finished.results
    for client in ("bakery", "garden", "harbour"):
        seen = [done for done, total, _, _ in listener.parts["selection", client, client] if total == 256]
        assert seen == sorted(seen)
        assert seen[-1] == 256
        for number, line in enumerate(record.rounds, start=1):
            parts = listener.parts["training", f"round {number}  {client}", client]
            assert [(done, total) for done, total, _, _ in parts] == [(1, 2), (2, 2)]
            assert fmean(loss for _, _, loss, _ in parts) == pytest.approx(line["clients"][client]["loss"], abs=1e-12)
        models = [note for _, _, _, note in listener.parts["evaluation", client, client]]
        assert models == ["model base", "model shared", "model trained", "model personal"]


def test_verbose_has_a_line_per_client_and_round_with_the_time_left(command, world, tmp_path):
    recipe = world.write(tmp_path / "recipe.yaml", **LEAN, federation={"rounds": 2})
    done = command("run", recipe, "--out", tmp_path / "out", "--verbose")
    assert done.code == 0
    lines = re.findall(r"^training +(\d)/6.*  round (\d)  (\w+)  loss \d\.\d{3}$", done.err, re.MULTILINE)
    clients = ["bakery", "garden", "harbour"]
    assert lines == [(str(1 + number), str(1 + number // 3), clients[number % 3]) for number in range(6)]
    short = command("resume", tmp_path / "out", "--rounds", "3")
    assert "round 3  garden" not in short.err  # nothing took 5 seconds
    silent = command("resume", tmp_path / "out", "--rounds", "4", "--verbose", "--json")
    assert silent.err == ""
    assert json.loads(silent.out)["rounds"] == 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_a_commit_waits_for_its_end(command, world, finished, tmp_path, monkeypatch, number, code):
    """It comes twice while the second round's line is being written: the round is committed, then the run stops and says how to go on."""
    recipe, append = world.write(tmp_path / "recipe.yaml"), files.append_line
    before = signal.getsignal(number)

    def signalled(path, line):
        append(path, line)
        if line["round"] == 1:
            signal.raise_signal(number)
            signal.raise_signal(number)

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files, "append_line", signalled)
        done = command("run", recipe, "--out", tmp_path / "my runs" / "first", "--quiet")
    assert (done.code, done.out) == (code, "")
    assert done.err == "Stopped. What was finished is saved; continue with: fedgraft resume 'my runs/first'\n"
    assert signal.getsignal(number) == before
    folder = tmp_path / "my runs" / "first"
    assert Bundle.load(folder / "state" / "state.safetensors").facts["round"] == 2
    assert [line["round"] for line in files.read_lines(folder / "rounds.jsonl")] == [0, 1]
    assert resume(folder).digest == finished.digest


def test_from_python_sigterm_is_left_to_the_program_and_ctrl_c_waits_too(world, tmp_path, monkeypatch):
    append = files.append_line

    def signalled(path, line):
        signal.raise_signal(signal.SIGINT)
        append(path, line)

    monkeypatch.setattr(files, "append_line", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped):
        run(world.recipe(**LEAN), out=tmp_path / "out")
    assert signal.getsignal(signal.SIGTERM) == before
    assert Bundle.load(tmp_path / "out" / "state" / "state.safetensors").facts["round"] == 1


def test_stopped_while_loading_nothing_was_begun(command, world, tmp_path, monkeypatch):
    monkeypatch.setattr(hosting, "load_base", lambda settings: signal.raise_signal(signal.SIGTERM))
    done = command("run", world.write(tmp_path / "recipe.yaml"), "--out", tmp_path / "out", "--quiet")
    assert (done.code, done.err) == (143, "Stopped. Nothing was begun.\n")
    assert not (tmp_path / "out").exists()


def test_the_way_on_is_typed_as_it_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resume_command(tmp_path / "runs" / "a") == "fedgraft resume runs/a"
    assert resume_command(tmp_path.parent) == f"fedgraft resume {tmp_path.parent}"
    assert resume_command(tmp_path / "my runs") == "fedgraft resume 'my runs'"
