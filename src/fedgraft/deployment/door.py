"""The door of a site: a private folder with the worker's socket, by which other processes of the same user reach it, and nobody else.

The folder has mode 0700, the socket 0600. Where there are no Unix sockets, or on wish, the worker listens on loopback instead and asks for
a random token that is new at every start and lies in a file of mode 0600. Beside it `worker.json` says who listens where. The folder holds
nothing else, so it can be all that a container with the SuperNode sees of the site.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedgraft import __version__, files

SOCKET, TOKEN, NOTICE = "worker.sock", "token", "worker.json"
LOOPBACK = "127.0.0.1"
LONGEST = 103
"""Bytes of a Unix socket's path that every system takes."""
BACKLOG = 64


class NoWorkerError(ConnectionError):
    """No worker listens at this door."""


@dataclass(frozen=True)
class Door:
    """An open door."""

    listener: socket.socket
    token: str
    """What a frame's header must show under `token`; "" where the folder's mode is the guard."""

    def admits(self, header: dict[str, Any]) -> bool:
        """Whether a header shows the token; compared in constant time."""
        shown = header.get("token", "")
        return isinstance(shown, str) and hmac.compare_digest(shown.encode(), self.token.encode())


def has_unix_sockets() -> bool:
    """Whether this system has them."""
    return hasattr(socket, "AF_UNIX")


def make_private(folder: Path) -> None:
    """Create a folder that only this process's user may enter, or check that an existing one is such.

    Raises:
        ValueError: others may enter it, or it belongs to somebody else.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    with tempfile.TemporaryFile() as probe:
        if found.st_uid != os.fstat(probe.fileno()).st_uid:
            raise ValueError(f"{folder}: belongs to another user; name a folder of your own")
    mode = stat.S_IMODE(found.st_mode)
    if os.name == "posix" and mode & 0o077:
        raise ValueError(f"{folder}: others may enter this folder (mode {mode:04o}); close it with: chmod 700 {folder}")


@contextmanager
def opened(folder: Path, *, loopback: bool = False) -> Iterator[Door]:
    """Listen at the door; what a dead worker left there is replaced.

    Args:
        folder: the door's own folder; created when absent.
        loopback: listen on loopback with a token although there are Unix sockets.

    Raises:
        ValueError: a live worker listens here already (naming its process), others may enter the folder, or its path is too long.
    """
    make_private(folder)
    lock = FileLock(folder / files.LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        process = _notice(folder).get("pid", "unknown")
        raise ValueError(f"{folder}: a worker runs here already (process {process}); stop that one first, or name another folder") from None
    try:
        _clear(folder)
        unix = has_unix_sockets() and not loopback
        with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as listener:
            door = _unix(folder, listener) if unix else _loopback(folder, listener)
            try:
                yield door
            finally:
                _clear(folder)
    finally:
        lock.release()


def connect(folder: Path) -> tuple[socket.socket, str]:
    """A connection to the worker at this door, and the token to show.

    Raises:
        NoWorkerError: none listens.
    """
    notice = _notice(folder)
    try:
        if "port" in notice:
            token = (folder / TOKEN).read_text(encoding="ascii")
            return socket.create_connection((LOOPBACK, int(notice["port"])), timeout=10), token
        if not notice or not has_unix_sockets():
            raise NoWorkerError(f"{folder}: no worker listens here")
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(folder / SOCKET))
        except OSError:
            connection.close()
            raise
    except (FileNotFoundError, ConnectionRefusedError):
        raise NoWorkerError(f"{folder}: no worker listens here; the last one (process {notice.get('pid')}) is gone") from None
    return connection, ""


def _unix(folder: Path, listener: socket.socket) -> Door:
    place = folder / SOCKET
    length = len(os.fsencode(place))
    if length > LONGEST:
        raise ValueError(f"{place}: {length} bytes are too long for a socket's path, at most {LONGEST}; set `socket` to a shorter folder")
    before = os.umask(0o177)  # the socket never has another mode, not even between two calls
    try:
        listener.bind(str(place))
    finally:
        os.umask(before)
    listener.listen(BACKLOG)
    _announce(folder)
    return Door(listener, "")


def _loopback(folder: Path, listener: socket.socket) -> Door:
    listener.bind((LOOPBACK, 0))
    token = secrets.token_hex(32)
    handle = os.open(folder / TOKEN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as sink:
        sink.write(token.encode())
    listener.listen(BACKLOG)
    _announce(folder, port=listener.getsockname()[1])
    return Door(listener, token)


def _announce(folder: Path, **place: int) -> None:
    files.write_json(folder / NOTICE, {"pid": os.getpid(), "fedgraft": __version__, **place})


def _notice(folder: Path) -> dict[str, Any]:
    """Who listens here by its own word, which a killed worker leaves behind; {} when nobody has."""
    try:
        notice = files.parse_json((folder / NOTICE).read_bytes())
    except (OSError, ValueError):
        return {}
    return notice if isinstance(notice, dict) else {}


def _clear(folder: Path) -> None:
    place = folder / SOCKET
    if os.path.lexists(place) and not stat.S_ISSOCK(place.lstat().st_mode):
        raise ValueError(f"{place}: is in the way and no socket; move it elsewhere")
    for name in (SOCKET, TOKEN, NOTICE):
        (folder / name).unlink(missing_ok=True)
