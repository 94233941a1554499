"""A worker in a process of its own, with a stand-in for the site behind it, and the way to talk to it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedgraft.deployment import door, frames
from tests.run.conftest import ENVIRONMENT, ROOT, world

__all__ = ["ask", "hear", "knock", "start", "wait_for", "world"]


def knock(folder: Path, body: bytes = b"", kind: str = "question") -> Any:
    """Open a connection and put a question, without waiting for the answer."""
    connection, token = door.connect(folder)
    frames.send(connection, {"kind": kind, "token": token}, body)
    return connection


def hear(connection: Any) -> tuple[dict[str, Any], bytes]:
    """The answer on a connection, which is closed."""
    with connection:
        header, length = frames.receive_header(connection)
        return header, frames.receive_body(connection, length, 1 << 30)


def ask(folder: Path, body: bytes = b"", kind: str = "question") -> tuple[dict[str, Any], bytes]:
    """Question and answer."""
    return hear(knock(folder, body, kind))


def wait_for(found: Callable[[], Any], patience: float = 60) -> Any:
    """What `found` gives as soon as it gives something."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.01)
    raise AssertionError("waited in vain")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start(folder, *options)`: the stand-in's worker (tests/deployment/serve.py) behind a door, once it listens."""
    begun: list[subprocess.Popen[str]] = []

    def begin(folder: Path, *options: str, waits: bool = True) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "tests.deployment.serve", str(folder), *options]
        process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        begun.append(process)
        if waits:
            wait_for(lambda: process.poll() is not None or _pid(folder) == process.pid)
        return process

    yield begin
    for process in begun:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _pid(folder: Path) -> Any:
    try:
        return ask(folder, kind="status")[0]["status"]["pid"]
    except ConnectionError:
        return None
