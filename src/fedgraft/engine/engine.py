"""What a run needs of an engine: the only way to reach clients, and the numbering that makes a run resumable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from fedgraft.aggregation.server import Reply
from fedgraft.bundle import Bundle
from fedgraft.training.client import MemoryStore, Report


@dataclass
class Traffic:
    """Encoded bytes since the last reset: packages and replies, without the few hundred bytes of an engine's own envelope."""

    down: int = 0
    up: int = 0

    @property
    def facts(self) -> dict[str, int]:
        """As a record calls them."""
        return {"bytes_down": self.down, "bytes_up": self.up}


class Listener(Protocol):
    """Hears what becomes of questions; `Session` is one."""

    def hear(self, client: str) -> Report:
        """A client of this process was opened; what it returns hears how far it is."""

    def failed(self, client: str, reason: str) -> None:
        """A client could not train; its memory is what it was."""

    def lost(self, client: str, reason: str) -> None:
        """No usable reply came from a client, whose memory may have moved on."""

    def warn(self, text: str) -> None:
        """Something that the user should know."""


class Engine(Protocol):
    """Reaches the clients of a run.

    `asked` counts the questions put to clients so far, `committed` is its value at the coordinator's last commit; both travel with each
    question, so that a client's memory goes back with a coordinator that went back to its last commit.
    """

    asked: int
    committed: int
    traffic: Traffic

    @property
    def store(self) -> MemoryStore | None:
        """The client memories, where this process can read them."""

    @property
    def left(self) -> frozenset[str]:
        """Clients that have withdrawn: they are not asked, and what they may still send is not used."""

    def ask(self, question: str, packages: dict[str, Bundle]) -> Iterator[Reply]:
        """Put one question to many clients; replies come in the order of the packages, a lost or failed client is absent."""

    def close(self) -> None:
        """Nothing more is asked; safe to call again."""
