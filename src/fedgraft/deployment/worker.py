"""The lasting process of a site: it holds base model, rows and client memory, and answers one question at a time.

A question is bytes in, bytes out. Threads greet who knocks and read the headers of their frames; the main thread takes the questions in the
order they came, so that signals and torch have the thread they expect. Only JSON and bytes are read: nothing that arrives is ever run.
"""

from __future__ import annotations

import _thread
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeAlias

from fedgraft import __version__
from fedgraft.deployment import frames
from fedgraft.deployment.door import BACKLOG, Door
from fedgraft.signals import STOPPING, Terminated

Handle: TypeAlias = Callable[[bytes], bytes]
"""Question -> answer."""
POLL = 0.2
"""Seconds between two looks at whether to stop, where the system does not wake a waiting thread."""


@dataclass
class _Knock:
    """A question whose header has been read."""

    connection: socket.socket
    length: int


@dataclass(kw_only=True)
class Worker:
    """Serves questions until it is stopped."""

    handle: Handle
    most_bytes: int
    """Longest question that is read."""
    grace: float
    """Seconds that the question in hand is given when the worker is told to stop."""
    tell: Callable[[str], None] = lambda line: None
    """Hears one line per event, for people at the site."""
    answered: int = 0
    _since: float | None = None
    _knocks: queue.Queue[_Knock] = field(default_factory=lambda: queue.Queue(BACKLOG))
    _stopping: bool = False
    _timer: threading.Timer | None = None

    def serve(self, door: Door) -> None:
        """Answer until SIGTERM, Ctrl-C or a `stop` frame.

        The question in hand is finished and answered, if `grace` suffices; a second signal stops it at once. What waits is sent away.
        """
        door.listener.settimeout(POLL)
        greeter = threading.Thread(target=self._greet, args=(door,), daemon=True)
        greeter.start()
        try:
            with self._signals():
                while not self._stopping:
                    with suppress(queue.Empty):
                        self._answer(self._knocks.get(timeout=POLL))
        except KeyboardInterrupt:
            if self._since is not None:
                self.tell("stopped in the middle of a question; asked again, it starts from the memory it began with")
        finally:
            self._stopping = True
            if self._timer:
                self._timer.cancel()
            greeter.join()
            self._send_away()

    def status(self) -> dict[str, Any]:
        """Who this is and what it is doing."""
        return {
            "pid": os.getpid(),
            "fedgraft": __version__,
            "answered": self.answered,
            "waiting": self._knocks.qsize(),
            "busy": None if self._since is None else round(time.monotonic() - self._since, 1),
        }

    def _greet(self, door: Door) -> None:
        while not self._stopping:
            with suppress(TimeoutError):
                connection, _ = door.listener.accept()
                threading.Thread(target=self._hear, args=(door, connection), daemon=True).start()

    def _hear(self, door: Door, connection: socket.socket) -> None:
        """Read one header; questions go to the main thread, the rest is answered here."""
        try:
            header, length = frames.receive_header(connection)
            if not door.admits(header):
                raise ValueError("wrong token")
            kind = header.get("kind")
            if kind == "question" and not self._stopping:
                self._knocks.put_nowait(_Knock(connection, length))
                return
            if kind == "stop":
                _thread.interrupt_main(signal.SIGTERM)
            frames.send(connection, {"verdict": "answered", "status": self.status()} if kind != "question" else _failed("it is stopping"))
        except queue.Full:
            _try_to_send(connection, _failed(f"{BACKLOG} questions are waiting already"))
        except ValueError as error:
            _try_to_send(connection, _failed(str(error)))
        except OSError:
            pass  # it knocked and went away
        connection.close()

    def _answer(self, knock: _Knock) -> None:
        self._since = time.monotonic()
        with knock.connection as connection:
            try:
                question = frames.receive_body(connection, knock.length, self.most_bytes)
                frames.send(connection, *self._handled(question))
            except OSError as error:
                self.tell(f"who asked is gone ({error}); the next question is taken")
            except ValueError as error:
                _try_to_send(connection, _failed(str(error)))
        self.answered += 1
        self._since = None

    def _handled(self, question: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            return {"verdict": "answered"}, self.handle(question)
        except Exception as error:  # whatever a question sets off, the next one is answered
            self.tell(f"a question failed with {type(error).__name__}: {error}")
            return _failed(f"{type(error).__name__}, which its own log describes"), b""

    def _send_away(self) -> None:
        with suppress(queue.Empty):
            while True:
                knock = self._knocks.get_nowait()
                _try_to_send(knock.connection, _failed("it is stopping"))
                knock.connection.close()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._stop) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._stopping or self._since is None:
            raise Terminated
        self._stopping = True
        self.tell(f"stopping; the question in hand has {self.grace:g} s to finish")
        self._timer = threading.Timer(self.grace, _thread.interrupt_main, [number])
        self._timer.daemon = True
        self._timer.start()


def _failed(reason: str) -> dict[str, Any]:
    return {"verdict": "failed", "reason": f"the site's worker did not take the question: {reason}"}


def _try_to_send(connection: socket.socket, header: dict[str, Any]) -> None:
    with suppress(OSError):
        frames.send(connection, header)
