"""The worker as a process: one question at a time, unharmed by who comes and goes, and a good end."""

from __future__ import annotations

import os
import signal

import pytest

from fedgraft.deployment import door, frames
from tests.deployment.conftest import ask, hear, knock, wait_for

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals to other processes")


@pytest.fixture
def place(tmp_path):
    return tmp_path / "door"


def busy(place, question):
    """The worker with a question in hand; its connection, and the file that lets it end."""
    connection = knock(place, f"wait:{question}".encode())
    wait_for(question.with_name(f"{question.name}.begun").exists)
    return connection


def test_one_at_a_time_in_the_order_of_arrival(place, start, tmp_path):
    start(place)
    first = busy(place, tmp_path / "first")
    second = knock(place, f"wait:{tmp_path / 'second'}".encode())
    wait_for(lambda: ask(place, kind="status")[0]["status"]["waiting"] == 1)
    third = knock(place, b"echo:third")
    wait_for(lambda: ask(place, kind="status")[0]["status"]["waiting"] == 2)
    (tmp_path / "first").touch()
    assert hear(first)[1] == str(tmp_path / "first").encode()
    wait_for((tmp_path / "second.begun").exists)
    assert ask(place, kind="status")[0]["status"]["waiting"] == 1
    (tmp_path / "second").touch()
    assert hear(second)[0]["verdict"] == hear(third)[0]["verdict"] == "answered"
    assert ask(place, kind="status")[0]["status"]["answered"] == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_finishes_what_is_in_hand(place, start, tmp_path, number):
    process = start(place)
    asked = busy(place, tmp_path / "question")
    waiting = knock(place, b"echo:too late")
    wait_for(lambda: ask(place, kind="status")[0]["status"]["waiting"] == 1)
    process.send_signal(number)
    assert "stopping" in process.stdout.readline()
    (tmp_path / "question").touch()
    assert hear(asked)[0] == {"verdict": "answered"}
    assert "stopping" in hear(waiting)[0]["reason"]
    assert process.wait(timeout=60) == 0
    assert [path.name for path in place.iterdir() if path.name != ".lock"] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_idle_it_stops_at_once(place, start, number):
    process = start(place)
    process.send_signal(number)
    assert process.wait(timeout=60) == 0
    assert not (place / door.SOCKET).exists()


def test_a_stop_frame_is_a_signal(place, start):
    process = start(place, "--loopback")
    assert ask(place, kind="stop")[0]["verdict"] == "answered"
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("options", [["--grace", "0.1"], ["--grace", "3600", "again"]])
def test_the_grace_ends_by_itself_or_by_a_second_signal(place, start, tmp_path, options):
    process = start(place, *options)
    asked = busy(place, tmp_path / "never")
    process.send_signal(signal.SIGTERM)
    assert "stopping" in process.stdout.readline()
    if "again" in options:
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert "middle of a question" in process.stdout.read()
    with pytest.raises(ConnectionResetError):
        hear(asked)
    assert not (place / door.SOCKET).exists()


def test_who_goes_away_does_no_harm(place, start, tmp_path):
    process = start(place)
    busy(place, tmp_path / "question").close()  # in the middle of the question
    connection, _ = door.connect(place)
    connection.sendall(frames.PREFIX.pack(frames.MAGIC, 19, 500) + b'{"kind":"question"}' + b"half of it")
    connection.close()
    door.connect(place)[0].close()  # without a word
    (tmp_path / "question").touch()
    assert ask(place, b"echo:well")[1] == b"well"
    assert process.poll() is None


@pytest.mark.parametrize(
    ("body", "said"), [(b"x" * 1001, "at most 1000"), (b"fail:", "RuntimeError, which its own log describes")], ids=["too long", "a bug"]
)
def test_a_question_that_cannot_be_taken_says_why_and_the_next_is_answered(place, start, body, said):
    start(place)
    header, answer = ask(place, body)
    assert (header["verdict"], answer) == ("failed", b"")
    assert said in header["reason"]
    assert "row 17" not in str(header)
    assert ask(place, b"echo:next")[1] == b"next"


def test_what_is_no_frame_is_told_so(place, start):
    start(place)
    connection, _ = door.connect(place)
    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert "not a frame" in hear(connection)[0]["reason"]
