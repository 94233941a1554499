"""Everything in one process: `ask` is a call, yet packages and replies go through the codec, so bytes are counted from the real payload."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from fedgraft.aggregation.server import Reply
from fedgraft.bundle import Bundle
from fedgraft.training.client import Client, MemoryStore
from fedgraft.training.fit import NotFiniteError

Question: TypeAlias = Callable[[Client, Bundle], Bundle]
"""The client's half of a question: (client, package) -> reply."""


@dataclass
class Traffic:
    """Encoded bytes since the last reset, as they would cross a wire."""

    down: int = 0
    up: int = 0


@dataclass(kw_only=True)
class InProcess:
    """The in-process engine. One client is open at a time, so memory does not grow with their number.

    `asked` counts the questions put to clients so far, `committed` is its value at the coordinator's last commit; a client's memory is read
    at the version `asked` and written at the next.
    """

    questions: Mapping[str, Question]
    open_client: Callable[[str], Client]
    store: MemoryStore
    asked: int = 0
    committed: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    on_send: Callable[[str, str, bytes], None] = lambda question, client, content: None
    """Sees every reply as bytes, before the coordinator does."""
    on_failure: Callable[[str, str], None] = lambda client, reason: None
    """Hears of every client whose training failed."""

    def ask(self, question: str, packages: dict[str, Bundle]) -> Iterator[Reply]:
        """Put one question to many clients, one after another.

        A client whose loss is not finite is stopped: its reply is lost, its memory stays as it was before the question.
        """
        version = self.asked
        self.asked += 1
        for name, package in packages.items():
            try:
                bundle = self._answer(question, name, package, version)
            except NotFiniteError as error:
                self.on_failure(name, str(error))
            else:
                yield Reply(client=name, bundle=bundle)

    def _answer(self, question: str, name: str, package: Bundle, version: int) -> Bundle:
        sent = package.encode()
        self.traffic.down += len(sent)
        client = self.open_client(name)
        client.memory = before = self.store.load(name, version)
        reply = self.questions[question](client, Bundle.decode(sent)).encode()
        if client.memory is not before:
            self.store.save(name, version + 1, client.memory, self.committed)
        self.on_send(question, name, reply)
        self.traffic.up += len(reply)
        return Bundle.decode(reply)
