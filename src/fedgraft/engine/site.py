"""The client's half of a run: rows, base model and client memories of one process, asked in bytes and answering in bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from fedgraft.bundle import Bundle
from fedgraft.training.client import Client, MemoryStore

Question: TypeAlias = Callable[[Client, Bundle], Bundle]
"""The client's half of a question: (client, package) -> reply."""


@dataclass(kw_only=True)
class Site:
    """Answers for the clients of this process. One client is open at a time, so memory does not grow with their number."""

    questions: Mapping[str, Question]
    open_client: Callable[[str], Client]
    store: MemoryStore

    def answer(self, question: str, client: str, content: bytes, *, asked: int, committed: int) -> bytes:
        """The encoded reply to an encoded package.

        Args:
            question: what is asked, by name.
            client: who is asked.
            content: the package.
            asked: how many questions came before; the client's memory is read at this version and written at the next.
            committed: `asked` at the coordinator's last commit; the memory that belongs to it is kept.

        Raises:
            NotFiniteError: training failed; the memory is what it was.
            ValueError: a damaged package, or no such question.
        """
        if question not in self.questions:
            raise ValueError(f"question {question!r} is unknown here; install the fedgraft version of the coordinator")
        opened = self.open_client(client)
        opened.memory = before = self.store.load(client, asked)
        reply = self.questions[question](opened, Bundle.decode(content, f"the package for client {client!r}")).encode()
        if opened.memory is not before:
            self.store.save(client, asked + 1, opened.memory, committed)
        return reply
