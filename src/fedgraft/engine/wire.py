"""What crosses the wire: a frame, its bytes, and its Flower records.

A frame is a small head of JSON facts beside an encoded `Bundle`. The bundle travels as one array of bytes, not leaf by leaf: Flower then
neither looks at dtypes (it refuses bfloat16) nor compares keys between clients, moves large content in chunks and in parallel, and keeps
equal packages to many clients once. The same bytes in a ConfigRecord cost some ten times the processor time. The checksum inside the
bundle is verified by whoever decodes it, that of the head here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedgraft.files import parse_json

if TYPE_CHECKING:
    from flwr.app import RecordDict

SCHEMA = 1
STYPE = "fedgraft.bundle"
SIZE = 8
ECHOED = ("run", "client", "question", "asked")
"""Facts of a request that its reply repeats, so that one to another request is known as that."""
MOST_REASON = 2000
HEAD_BYTES = 1 << 24
"""Longest head that is parsed; a recipe has some kilobytes."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A request to a site or its response.

    Requests: `join` (answered by `card`), `ask` (by `reply`), `leave` (by `left`). Instead of an answer come `failed` (training went wrong;
    the client's memory is what it was) and `refused` (the site can't or won't), both with the fact `reason`.
    """

    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    content: bytes = b""
    """An encoded bundle, or nothing."""

    @property
    def reason(self) -> str:
        """Why there is no answer, fit to be shown: the other side's word, so it may hold anything."""
        told = str(self.facts.get("reason") or "no reason given")[:MOST_REASON]
        return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in told)

    def encode(self) -> bytes:
        """Length of the head, head, content."""
        head = self._head().encode()
        return len(head).to_bytes(SIZE, "little") + head + self.content

    @staticmethod
    def decode(raw: bytes, source: str = "message") -> Frame:
        """The inverse of `encode`.

        Raises:
            ValueError: damaged, or of a newer schema; names `source`.
        """
        size = int.from_bytes(raw[:SIZE], "little")
        return Frame._of(raw[SIZE : SIZE + size], raw[SIZE + size :], source)

    def records(self) -> RecordDict:
        """The frame as the content of a Flower message."""
        from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

        body = Array(dtype="uint8", shape=(len(self.content),), stype=STYPE, data=self.content)
        return RecordDict({"head": ConfigRecord({"json": self._head()}), "body": ArrayRecord({"bundle": body})})

    @staticmethod
    def of_records(records: RecordDict, source: str = "message") -> Frame:
        """The inverse of `records`.

        Raises:
            ValueError: as `decode`.
        """
        try:
            head, content = str(records["head"]["json"]), records["body"]["bundle"].data  # type: ignore[union-attr]
        except (KeyError, AttributeError) as error:
            raise ValueError(f"{source}: damaged or not written by fedgraft (no {error})") from error
        return Frame._of(head.encode(), content, source)

    def _head(self) -> str:
        text = json.dumps({"schema": SCHEMA, "kind": self.kind, "facts": self.facts, "bytes": len(self.content)})
        return json.dumps({"sum": _sum(text), "head": text})

    @staticmethod
    def _of(head: bytes, content: bytes, source: str) -> Frame:
        try:
            if len(head) > HEAD_BYTES:
                raise ValueError(f"a head of {len(head)} bytes, at most {HEAD_BYTES} are read")
            outer = parse_json(head)
            inner = parse_json(outer["head"])
            if outer["sum"] != _sum(outer["head"]) or inner["bytes"] != len(content):
                raise ValueError("its checksum or length does not fit")
            schema, kind, facts = int(inner["schema"]), str(inner["kind"]), {**inner["facts"]}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{source}: damaged or not written by fedgraft ({type(error).__name__}: {error})") from error
        if schema > SCHEMA:
            raise ValueError(f"{source}: written by a newer fedgraft (schema {schema}, this one reads up to {SCHEMA}); upgrade fedgraft")
        return Frame(kind=kind, facts=facts, content=content)


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
