"""The processes a command starts: each with a log, all stopped with the command, none left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from fedgraft.signals import deferred

GRACE = 10.0  # seconds from SIGTERM to SIGKILL
POLL = 0.1  # seconds between looks at a process or port
PATIENCE = 120.0  # seconds for a process to start listening; a loaded machine takes long to import
LOCAL = "127.0.0.1"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FORWARDED_ALLOW_IPS": LOCAL,  # the SuperLink's gate goes by the address of who asks
    "PYTHONUTF8": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Flower installs nothing, tells nobody, and asks for no newer version."""


@dataclass(kw_only=True)
class Part:
    """One process."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    offset: int
    """Where this start's part of the log begins."""

    def ended(self) -> int | None:
        """The exit code, None while it runs."""
        return self.process.poll()

    def said(self) -> str:
        """The log since its start."""
        with self.log.open("rb") as log:
            log.seek(self.offset)
            return log.read().decode("utf-8", "replace")

    def last_words(self, lines: int = 6) -> str:
        """The end of the log, and where it lies."""
        said = [line for line in self.said().splitlines() if line.strip()][-lines:]
        return "\n".join([*(f"  {line}" for line in said), f"the whole log: {self.log}"])

    def fail(self, remedy: str) -> ValueError:
        """What to raise when it has ended."""
        return ValueError(f"{self.name} ended with exit code {self.ended()}; it said last\n{self.last_words()}\n{remedy}")


class Parts:
    """All processes of a command; leaving the block stops them and what they have started."""

    def __init__(self, logs: Path, home: Path, extra: dict[str, str] | None = None) -> None:
        self.logs, self.parts = logs, list[Part]()
        self.environment = {**os.environ, **QUIET, "FLWR_HOME": str(home), **(extra or {})}
        scripts = str(Path(sys.executable).parent)  # Flower starts its own helpers by name
        self.environment["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
        for name in ("NO_PROXY", "no_proxy"):  # what runs on this machine is not asked for through a proxy
            self.environment[name] = ",".join(filter(None, [os.environ.get(name, ""), LOCAL, "localhost"]))

    def __enter__(self) -> Self:
        """Nothing runs yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop everything."""
        self.stop()

    def start(self, name: str, module: str, words: Sequence[str], directory: Path | None = None) -> Part:
        """A module as a process on a leash (`leash.py`), its output appended to `<logs>/<name>.log`."""
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{name}.log"
        command = [sys.executable, "-m", "fedgraft.deployment.leash", module, *words]
        with deferred(), log.open("ab") as sink:  # between its start and its entry in the list nothing may come
            offset = sink.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=directory,
                start_new_session=True,  # Ctrl-C reaches the command alone, which stops its processes in order
            )
            part = Part(name=name, process=process, log=log, offset=offset)
            self.parts.append(part)
        return part

    def stop(self, *only: Part) -> None:
        """End these processes (without any: all) and their descendants, the last started first; a second Ctrl-C waits."""
        with deferred():
            chosen = [part for part in reversed(self.parts) if not only or part in only]
            family = [process for part in chosen for process in _family(part.process.pid)]
            for part in chosen:
                if part.ended() is None:
                    part.process.terminate()
            deadline = time.monotonic() + GRACE
            for part in chosen:
                try:
                    part.process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    part.process.kill()
                    part.process.wait()
            end(family, grace=GRACE / 5)
            for part in chosen:
                assert part.process.stdin is not None
                part.process.stdin.close()
                self.parts.remove(part)


def end(family: Sequence[psutil.Process], grace: float) -> None:
    """SIGTERM, and after the grace SIGKILL, for whichever of these still runs."""
    for process in family:
        _send(process, "terminate")
    for process in _left(family, grace):
        _send(process, "kill")
    _left(family, grace)


def runs(process: psutil.Process) -> bool:
    """Whether it does; one that has ended and whose parent has not asked how is there still, and does nothing any more."""
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ready(part: Part, is_ready: Callable[[], bool], remedy: str) -> None:
    """Wait until a process does what it was started for.

    Raises:
        ValueError: it ended first, or takes too long.
    """
    deadline = time.monotonic() + PATIENCE
    while not is_ready():
        if part.ended() is not None:
            raise part.fail(remedy)
        if time.monotonic() > deadline:
            raise ValueError(f"{part.name} is not ready after {PATIENCE:.0f} s\n{part.last_words()}\n{remedy}")
        time.sleep(POLL)


def answers(host: str, port: int) -> bool:
    """Whether a connection is accepted."""
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        return int(probe.getsockname()[1])


def refuse_taken(host: str, port: int, remedy: str) -> None:
    """Let only a free port pass.

    Raises:
        ValueError: something listens there already, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        if os.name == "posix":  # a port whose last connections are being closed is free; on Windows the option means another thing
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"{host}:{port} can't be listened on ({error.strerror}); {remedy}") from None


def _left(family: Sequence[psutil.Process], grace: float) -> list[psutil.Process]:
    """Those that still run after so many seconds; it waits no longer than it must."""
    deadline = time.monotonic() + grace
    while (left := [process for process in family if runs(process)]) and time.monotonic() < deadline:
        time.sleep(POLL)
    return left


def _family(pid: int) -> list[psutil.Process]:
    """A process and all it has started that still runs."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _send(process: psutil.Process, what: str) -> None:
    with suppress(psutil.NoSuchProcess):
        getattr(process, what)()
