"""Frames between processes of one machine: two lengths, a JSON header, bytes.

Lengths are compared with a limit before anything of that size is allocated. Nothing but JSON and bytes is read, so a frame is data and
never code. A connection that stands still for `STALL` seconds in the middle of a frame is given up.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

from fedgraft.files import parse_json

MAGIC = b"fgw1"
PREFIX = struct.Struct(">4sIQ")
"""`MAGIC`, length of the header, length of the body."""
HEADER_BYTES = 1 << 16
PIECE = 1 << 20
STALL = 60.0


def send(connection: socket.socket, header: dict[str, Any], body: bytes = b"") -> None:
    """Write one frame.

    Raises:
        OSError: the other side is gone or stands still.
    """
    text = json.dumps(header).encode()
    assert len(text) <= HEADER_BYTES, "headers are short"
    connection.settimeout(STALL)
    connection.sendall(PREFIX.pack(MAGIC, len(text), len(body)) + text)
    rest = memoryview(body)
    while rest:
        rest = rest[connection.send(rest[:PIECE]) :]


def receive_header(connection: socket.socket, wait: float | None = STALL) -> tuple[dict[str, Any], int]:
    """The header of the next frame and the length of the body that follows.

    Args:
        connection: where it comes from.
        wait: seconds until it begins; None: as long as it takes.

    Raises:
        ValueError: this is no frame, or its header is too long.
        OSError: the other side is gone or stands still.
    """
    connection.settimeout(wait)
    magic, length, body = PREFIX.unpack(_exactly(connection, PREFIX.size))
    connection.settimeout(STALL)
    if magic != MAGIC:
        raise ValueError("not a frame of fedgraft; is the other side of the same version?")
    if length > HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes, at most {HEADER_BYTES} are read")
    try:
        header = parse_json(_exactly(connection, length))
    except ValueError:
        raise ValueError("a frame whose header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError("a frame whose header is no JSON object")
    return header, body


def receive_body(connection: socket.socket, length: int, most: int) -> bytes:
    """The body of a frame whose header has been read.

    Raises:
        ValueError: it is longer than `most`; nothing of it is read.
        OSError: the other side is gone or stands still.
    """
    if length > most:
        raise ValueError(f"a body of {length} bytes, at most {most} are read")
    return _exactly(connection, length)


def _exactly(connection: socket.socket, length: int) -> bytes:
    content = bytearray(length)
    rest = memoryview(content)
    while rest:
        count = connection.recv_into(rest, min(len(rest), PIECE))
        if not count:
            raise ConnectionResetError("the other side closed the connection in the middle of a frame")
        rest = rest[count:]
    return bytes(content)
