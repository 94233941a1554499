"""Processes are found listening, tell why they ended, and are gone afterwards, whoever ends first."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import closing

import psutil
import pytest

from fedgraft.deployment import processes
from tests.deployment.conftest import wait_for
from tests.run.conftest import ENVIRONMENT, ROOT

STUB = "tests.deployment.stub"


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT.get("PYTHONPATH", ""))
    with processes.Parts(tmp_path / "logs", tmp_path / "home") as made:
        yield made


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def family_of(part, tmp_path):
    """The pids of a started stub and of the child it started."""
    file = tmp_path / f"{part.name}.pids"
    wait_for(lambda: file.exists() and len(file.read_text().split()) == 2)
    return [int(pid) for pid in file.read_text().split()]


@pytest.mark.skipif(sys.platform == "win32", reason="no such state on Windows")
def test_one_that_has_ended_is_not_waited_for_though_its_parent_never_asks(monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(child.pid)
    wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE)
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: pytest.fail("it waited"))
    assert not processes.runs(process)
    processes.end([process], grace=60.0)
    child.wait()
    assert not processes.runs(process)


def test_a_port_is_waited_for(parts, tmp_path):
    port = processes.free_port()
    part = parts.start("stub", STUB, ["listen", str(port)], directory=ROOT)
    processes.ready(part, lambda: processes.answers("127.0.0.1", port), "Mend it.")
    assert processes.answers("127.0.0.1", port)


def test_an_end_before_listening_is_told_with_the_last_words(parts, tmp_path):
    part = parts.start("stub", STUB, ["fail", "the port is taken"], directory=ROOT)
    with pytest.raises(ValueError, match=r"(?s)stub ended with exit code 3; .*the port is taken.*stub\.log\nMend it\.") as error:
        processes.ready(part, lambda: False, "Mend it.")
    assert str(tmp_path / "logs" / "stub.log") in str(error.value)


def test_only_the_last_start_is_quoted(parts):
    for word in ("first", "second"):
        part = parts.start("stub", STUB, ["fail", word], directory=ROOT)
        part.process.wait(timeout=60)
    assert "second" in part.last_words()
    assert "first" not in part.last_words()


@pytest.mark.parametrize("kind", ["family", "stubborn"])
def test_stopping_ends_children_too_and_those_that_ignore_sigterm(parts, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(processes, "GRACE", 1.0)
    part = parts.start("stub", STUB, [kind, str(tmp_path / "stub.pids")], directory=ROOT)
    pids = family_of(part, tmp_path)
    parts.stop()
    assert part.ended() is not None
    assert all(map(gone, pids))
    assert parts.parts == []


@pytest.mark.parametrize(("signal", "kind"), [("terminate", "family"), ("kill", "family"), ("kill", "orderly")])
def test_nothing_is_left_when_the_command_itself_is_ended(tmp_path, signal, kind):
    """A command in a process of its own that has started a part with a child; SIGKILL leaves it no time to stop anything."""
    code = f"""
import sys, time
from pathlib import Path
from fedgraft.deployment.processes import Parts
from fedgraft.signals import terminating
with terminating(), Parts(Path({str(tmp_path / "logs")!r}), Path({str(tmp_path / "home")!r})) as parts:
    parts.start("stub", {STUB!r}, [{kind!r}, {str(tmp_path / "stub.pids")!r}])
    time.sleep(600)
"""
    command = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    file = tmp_path / "stub.pids"
    wait_for(lambda: file.exists() and len(file.read_text().split()) == 2)
    pids = [int(pid) for pid in file.read_text().split()]
    getattr(command, signal)()
    command.wait(timeout=60)
    wait_for(lambda: all(map(gone, pids)))


def test_a_taken_port_is_told(tmp_path):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"127\.0\.0\.1:{port} can't be listened on .*choose another"):
            processes.refuse_taken("127.0.0.1", port, "choose another")
    processes.refuse_taken("127.0.0.1", port, "choose another")


def test_flower_installs_nothing_and_tells_nobody(parts):
    for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "FLWR_HOME"):
        assert name in parts.environment
    assert parts.environment["FLWR_TELEMETRY_ENABLED"] == "0"
