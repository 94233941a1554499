"""Servers of the tiny world, in a thread of this process, and clients of theirs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import pytest
from openai import OpenAI

import fedgraft
from fedgraft.serve.keys import Ring
from fedgraft.serve.limits import Limits
from fedgraft.serve.server import Server, opened
from fedgraft.serve.service import Service
from tests.use.conftest import command, trained, world  # noqa: F401  # fixtures

Make = Callable[..., "Running"]


class Running(NamedTuple):
    """A server that takes requests."""

    server: Server
    url: str

    @property
    def service(self) -> Service:
        """What is behind its routes."""
        return self.server.service

    def client(self, key: str = "none", **options: Any) -> OpenAI:
        """OpenAI's own client; nothing is tried again."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def post(self, path: str = "chat/completions", key: str = "none", **request: Any) -> httpx.Response:
        """A bare request."""
        return httpx.post(f"{self.url}/v1/{path}", headers={"authorization": f"Bearer {key}"}, timeout=60, **request)


@pytest.fixture(scope="session")
def serving(trained: Callable[..., Any]) -> Iterator[Make]:  # noqa: F811
    """`serving(ring=None, method="flex", sections={}, **limits)`: a server on a free port, stopped at the end."""
    made: list[tuple[Running, threading.Thread]] = []

    def make(ring: Ring | None = None, method: str = "flex", sections: dict[str, Any] | None = None, **limits: Any) -> Running:
        loaded = fedgraft.load(trained(method, **(sections or {})).folder)
        server, ready = Server(Service(loaded, Limits(**limits)), ring), threading.Event()
        sink = opened("127.0.0.1", 0, keys=ring is not None)
        url = f"http://127.0.0.1:{sink.getsockname()[1]}"
        thread = threading.Thread(target=server.run_on, args=(sink, ready.set))
        thread.start()
        assert ready.wait(30)
        made.append((Running(server, url), thread))
        return made[-1][0]

    yield make
    for running, thread in made:
        running.server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
