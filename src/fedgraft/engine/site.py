"""The client's half of a run: rows, base model and client memories of one process, asked in bytes and answering in bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from fedgraft.bundle import Bundle
from fedgraft.training.client import Client, MemoryStore
from fedgraft.training.cohort import together
from fedgraft.training.fit import NotFiniteError, Passes

Question: TypeAlias = Callable[[Client, Bundle], Bundle]
"""The client's half of a question: (client, package) -> reply."""


@dataclass(kw_only=True)
class Site:
    """Answers for the clients of this process. One client, or one cohort, is open at a time, so memory does not grow with their number."""

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
        opened, before = self._open(client, asked)
        return self._closed(opened, before, self._reply(question, opened, content), asked, committed)

    def answer_together(
        self, question: str, contents: Mapping[str, bytes], *, asked: int, committed: int
    ) -> dict[str, bytes | NotFiniteError]:
        """As `answer`, for several clients that train in one cohort; in the place of a reply, why a client could not.

        Raises:
            ValueError: as `answer`; no memory is written then.
        """

        def working(client: Client, content: bytes) -> Callable[[Passes], Bundle]:
            def work(passes: Passes) -> Bundle:
                client.passes = passes
                return self._reply(question, client, content)

            return work

        opened = {name: self._open(name, asked) for name in contents}
        replies = together([working(client, contents[name]) for name, (client, _) in opened.items()])
        return {
            name: reply if isinstance(reply, NotFiniteError) else self._closed(client, before, reply, asked, committed)
            for (name, (client, before)), reply in zip(opened.items(), replies, strict=True)
        }

    def _open(self, name: str, asked: int) -> tuple[Client, Bundle]:
        """A client with its memory, and that memory."""
        client = self.open_client(name)
        client.memory = self.store.load(name, asked)
        return client, client.memory

    def _reply(self, question: str, client: Client, content: bytes) -> Bundle:
        if question not in self.questions:
            raise ValueError(f"question {question!r} is unknown here; install the fedgraft version of the coordinator")
        return self.questions[question](client, Bundle.decode(content, f"the package for client {client.name!r}"))

    def _closed(self, client: Client, before: Bundle, reply: Bundle, asked: int, committed: int) -> bytes:
        """The encoded reply, once the memory is written."""
        content = reply.encode()
        if client.memory is not before:
            self.store.save(client.name, asked + 1, client.memory, committed)
        return content
