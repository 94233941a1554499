"""Frames: what is sent arrives; what is no frame, or too large, is refused before it is read."""

from __future__ import annotations

import json
import socket
import tracemalloc

import pytest
from hypothesis import strategies as st

from fedgraft.deployment import frames
from tests.strategies import given


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@given(header=st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=5), body=st.binary(max_size=5000))
def test_what_is_sent_arrives(header, body):
    left, right = socket.socketpair()
    with left, right:
        frames.send(left, header, body)
        received, length = frames.receive_header(right)
        assert received == header
        assert frames.receive_body(right, length, length) == body


def test_a_body_above_the_limit_is_refused_unread(pair):
    left, right = pair
    left.sendall(frames.PREFIX.pack(frames.MAGIC, 2, 1 << 50) + b"{}")
    _, length = frames.receive_header(right)
    tracemalloc.start()
    with pytest.raises(ValueError, match="at most 1000"):
        frames.receive_body(right, length, 1000)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "not a frame"),
        (frames.PREFIX.pack(frames.MAGIC, 1 << 31, 0), "at most 65536"),
        (frames.PREFIX.pack(frames.MAGIC, 3, 0) + b"{,}", "not JSON"),
        (frames.PREFIX.pack(frames.MAGIC, 2, 0) + b"[]", "no JSON object"),
        (frames.PREFIX.pack(frames.MAGIC, 2, 0) + b"\xff\xff", "not JSON"),
    ],
)
def test_what_is_no_frame_is_refused(pair, content, said):
    left, right = pair
    left.sendall(content)
    with pytest.raises(ValueError, match=said):
        frames.receive_header(right)


@pytest.mark.parametrize("kept", [0, 5, frames.PREFIX.size, frames.PREFIX.size + 1, -1])
def test_an_end_in_the_middle_is_a_lost_connection(pair, kept):
    left, right = pair
    text = json.dumps({"kind": "question"}).encode()
    left.sendall((frames.PREFIX.pack(frames.MAGIC, len(text), 4) + text + b"body")[:kept])
    left.close()

    def read():
        _, length = frames.receive_header(right)
        frames.receive_body(right, length, 100)

    with pytest.raises(ConnectionResetError, match="middle of a frame"):
        read()


def test_a_connection_that_stands_still_is_given_up(pair, monkeypatch):
    monkeypatch.setattr(frames, "STALL", 0.05)
    with pytest.raises(TimeoutError):
        frames.receive_header(pair[1])
