"""One instruction with its response, and the reading of JSON-lines files with errors that name file and line."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation", "test")
SUFFIXES = (".jsonl", ".jsonl.gz")
LINE_BYTES = 1 << 24
"""Longest line that is read, compressed or not."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of instruction data; `turns` are the chat turns (role, content) before the instruction."""

    id: str
    category: str
    instruction: str
    context: str
    response: str
    turns: tuple[tuple[str, str], ...] = ()
    choices: tuple[str, ...] = field(default=(), repr=False)
    """Answers to choose from, the response among them; empty where the answer is free."""
    exact: bool = field(default=False, repr=False)
    """Whether an answer is right only when it is the response."""

    @property
    def scoring(self) -> str:
        """How answers are judged where that is the row's own affair; empty where it has nothing to say."""
        return f"{self.choices} {self.exact}" if self.choices or self.exact else ""


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place "<file>, line <n>", row) of each non-blank line of a `.jsonl` or `.jsonl.gz` file.

    Raises:
        ValueError: the file is missing, has another suffix, is no gzip file although its name says so, holds no row, or a line is not
            UTF-8, not JSON or not an object.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no such file; check data.path")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: the name must end in {' or '.join(SUFFIXES)} (one JSON object per line)")
    found = False
    for number, line in enumerate(_lines(path), start=1):
        place = f"{path}, line {number}"
        text = _decode(line, place)
        if text.strip():
            found = True
            yield place, _parse(text.rstrip(), place)  # a column of the line, not of the one after it
    if not found:
        raise ValueError(f"{path}: the file holds no rows; write one JSON object per line")


def row_files(path: Path) -> list[Path]:
    """The file itself, or the JSON-lines files in a folder and its subfolders, sorted by name; hidden ones are skipped.

    Raises:
        ValueError: the path does not exist or the folder has no such file.
    """
    if not path.is_dir():
        return [path]
    found = sorted(
        entry
        for entry in path.rglob("*")
        if entry.is_file() and entry.name.endswith(SUFFIXES) and not any(part.startswith(".") for part in entry.relative_to(path).parts)
    )
    if not found:
        raise ValueError(f"{path}: the folder holds no {' or '.join(SUFFIXES)} file")
    return found


def text_of(row: Mapping[str, Any], names: Sequence[str], place: str, *, required: bool = True) -> str:
    """The text of the first of `names` that the row has, without outer white space; "" when it is absent or null and not required.

    Raises:
        ValueError: the value is no text, cannot be written as UTF-8, or is required and empty.
    """
    name = next((name for name in names if row.get(name) is not None), None)
    value = "" if name is None else row[name]
    if not isinstance(value, str):
        raise ValueError(f"{place}: field {name!r} must be text, got {type(value).__name__}")
    if required and not value.strip():
        raise ValueError(f"{place}: field {name or names[0]!r} is empty; fill it or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: field {name!r} holds half of a surrogate pair, which is no character; remove it") from error
    return value.strip()


def fields_of(row: Mapping[str, Any]) -> str:
    """The row's field names for an error message."""
    return ", ".join(sorted(map(str, row))) or "none"


def check_split(split: str) -> None:
    """Refuse anything but train, validation and test.

    Raises:
        ValueError: another name.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are: {', '.join(SPLITS)}")


def hashed_split(text: str) -> str:
    """A split that is a function of the text alone: 80 % train, 10 % validation, 10 % test."""
    tenth = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10
    return {0: "test", 1: "validation"}.get(tenth, "train")


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as source:
            number = 0
            while line := source.readline(LINE_BYTES + 1):
                number += 1
                if len(line) > LINE_BYTES:
                    raise ValueError(f"{path}, line {number}: longer than {LINE_BYTES:,} bytes; write one row per line")
                yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: broken gzip file ({error}); write it again") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error


def _decode(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 (byte {error.start + 1} is {line[error.start]:#04x}); save the file as UTF-8") from error


def _parse(text: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "this looks like one JSON array: " if text.lstrip().startswith("[") else ""
        raise ValueError(f"{place}: broken JSON ({error.msg} at column {error.colno}); {hint}write one JSON object per line") from error
    except (ValueError, RecursionError):  # more digits than Python turns into a number, or more brackets than it follows
        raise ValueError(f"{place}: a number or a nesting that is too long to be read; a row is texts by name") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}; write one JSON object per line")
    return row
