"""Writing files so that a crash at any moment leaves either the old or the new one, never half of one; and one process per run folder.

An `OSError` of a write names the file that was to be written. A write that has begun is finished before Ctrl-C or SIGTERM takes effect.
Whoever reads JSON reads it with `parse_json`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedgraft.signals import deferred

LOCK = ".lock"
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def write_bytes(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, flush to the disk, rename over `path`."""
    with deferred(), _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with aside.open("wb") as sink:
                sink.write(content)
                sink.flush()
                os.fsync(sink.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        _flush_folder(path.parent)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for one indented JSON document."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_line(path: Path, value: Any) -> None:
    """Append one JSON line and flush it to the disk; nothing of it where it can't be written whole."""
    rest = memoryview((json.dumps(value, ensure_ascii=False) + "\n").encode())
    with deferred(), _naming(path), path.open("ab", buffering=0) as sink:
        before = sink.tell()
        try:
            while rest:
                rest = rest[sink.write(rest) :]
            os.fsync(sink.fileno())
        except OSError:
            sink.truncate(before)  # as a full disk leaves half a line, to which the next one would be joined
            raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` at the end of the block; after an error nothing is left.

    Raises:
        ValueError: `path` holds something already, or is a file.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: exists and is never overwritten; choose another --out")
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _naming(path):
        aside.mkdir(parents=True)
    try:
        yield aside
        with deferred(), _naming(path):
            for written in aside.rglob("*"):
                if written.is_file():
                    with written.open("rb+") as content:
                        os.fsync(content.fileno())
            if path.exists():
                path.rmdir()  # Windows renames over no folder, not even an empty one
            os.replace(aside, path)
            _flush_folder(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def parse_json(content: str | bytes) -> Any:
    """One JSON document in UTF-8, wherever it comes from.

    Raises:
        ValueError: it is none, is nested too deeply to be followed, or holds half of a surrogate pair, which could not be written again.
    """
    text = content.decode() if isinstance(content, bytes | bytearray) else content
    try:
        value = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def read_text(path: Path) -> str:
    """UTF-8 text.

    Raises:
        ValueError: it is not UTF-8; names file and line.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 (byte {content[error.start]:#04x}); save the file as UTF-8") from None


def read_lines(path: Path) -> list[Any]:
    """The JSON lines of a file, without a last line that a crash cut short; [] when there is no file.

    Raises:
        ValueError: a line is not JSON; names file and line.
    """
    if not path.exists():
        return []
    complete = path.read_bytes().split(b"\n")[:-1]  # bytes, since a crash may cut a character in two
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(complete, start=1) if line]


@contextmanager
def locked(folder: Path, wait: float = 0) -> Iterator[None]:
    """No other process runs in the folder meanwhile. The system keeps the lock, so that of a killed process is gone with it.

    Args:
        folder: what is locked; it exists.
        wait: seconds that another process is given to end.

    Raises:
        ValueError: another one runs there.
    """
    lock = FileLock(folder / LOCK, timeout=wait)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder}: another fedgraft is running in this folder; wait until it has ended, or stop it with Ctrl-C (nothing is lost)"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors name the file that was to be written, where the system names none or a temporary one."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _parse(line: bytes, place: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise ValueError(f"{place}: damaged ({error}); restore the file from a copy, or start a new run") from None


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows cannot open a folder; its rename is durable by itself
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
