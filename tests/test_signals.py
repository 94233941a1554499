"""Signals that wait."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import nullcontext

import pytest

from fedgraft import files
from fedgraft.signals import Terminated, deferred, terminating

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a process cannot send itself these signals elsewhere")


@pytest.fixture(autouse=True)
def same_handlers():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def sent(done: list[str], *numbers: signal.Signals) -> None:
    """A write during which signals arrive, one block inside another, and something after it."""
    with deferred():
        with deferred():
            for number in numbers:
                signal.raise_signal(number)
            done.append("inner")
        done.append("outer")
    done.append("after")


@pytest.mark.parametrize("times", [0, 1, 3])
def test_ctrl_c_waits_for_the_end_of_the_outermost_block(times):
    done: list[str] = []
    expected = pytest.raises(KeyboardInterrupt) if times else nullcontext()
    with expected:
        sent(done, *[signal.SIGINT] * times)
    assert done == ["inner", "outer"] + ["after"] * (times == 0)


def test_sigterm_waits_too_and_is_told_apart():
    done: list[str] = []
    with terminating(), pytest.raises(Terminated):
        sent(done, signal.SIGTERM)
    assert done == ["inner", "outer"]


def test_an_error_in_the_block_passes():
    with pytest.raises(OSError, match="full"), deferred():
        raise OSError("full")


def test_other_threads_are_left_alone():
    done = []

    def work():
        with deferred(), terminating():
            done.append(threading.current_thread())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [thread]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_write_that_has_begun_is_finished(tmp_path, monkeypatch, moment):
    """Ctrl-C twice in the middle of a write leaves the new file, whole, and nothing beside it."""
    path, real = tmp_path / "state", getattr(os, moment)
    files.write_bytes(path, b"old")

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(os, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]
