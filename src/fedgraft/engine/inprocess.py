"""Everything in one process: `ask` is a call, yet packages and replies go through the codec, so bytes are counted from the real payload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fedgraft.aggregation.server import Reply
from fedgraft.bundle import Bundle
from fedgraft.engine.engine import Traffic
from fedgraft.engine.site import Site
from fedgraft.training.client import MemoryStore
from fedgraft.training.fit import NotFiniteError


@dataclass(kw_only=True)
class InProcess:
    """The in-process engine: a loop over one site."""

    site: Site
    asked: int = 0
    committed: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    on_send: Callable[[str, str, bytes], None] = lambda question, client, content: None
    """Sees every reply as bytes, before the coordinator does."""
    on_failure: Callable[[str, str], None] = lambda client, reason: None
    """Hears of every client whose training failed."""

    @property
    def store(self) -> MemoryStore:
        """The client memories."""
        return self.site.store

    @property
    def left(self) -> frozenset[str]:
        """Nobody withdraws from a process."""
        return frozenset()

    def ask(self, question: str, packages: dict[str, Bundle]) -> Iterator[Reply]:
        """Put one question to many clients, one after another.

        A client whose loss is not finite is stopped: its reply is lost, its memory stays as it was before the question.
        """
        version = self.asked
        self.asked += 1
        for name, package in packages.items():
            sent = package.encode()
            self.traffic.down += len(sent)
            try:
                reply = self.site.answer(question, name, sent, asked=version, committed=self.committed)
            except NotFiniteError as error:
                self.on_failure(name, str(error))
                continue
            self.on_send(question, name, reply)
            self.traffic.up += len(reply)
            yield Reply(client=name, bundle=Bundle.decode(reply, f"the reply of client {name!r}"))

    def close(self) -> None:
        """Nothing is held."""
