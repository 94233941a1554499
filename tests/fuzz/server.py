"""The HTTP server before any bytes: parser, gate, routes and bodies, over a connection in memory. No model answers."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
from importlib import resources
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from transformers import AutoTokenizer

from fedgraft.data.batches import prompt_ids
from fedgraft.data.settings import DataSettings
from fedgraft.serve.limits import Limits
from fedgraft.serve.scheduler import Told
from fedgraft.serve.server import Server
from fedgraft.serve.service import Service
from fedgraft.use.prompts import example_of

STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
LONGEST, PATIENCE = 200, 30


class AtOnce:
    """A scheduler that has every answer at once."""

    alive = True

    def __init__(self, *parts: Any) -> None: ...

    def submit(self, jobs: Any) -> None:
        for job in jobs:
            job.answer.text, job.answer.reason = "A", "stop"
            job.tell(Told("A" if job.streams else "", job.answer))


class Connection(asyncio.Transport):
    """The server's side of a connection of which all is kept."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written, self.closed = b"", False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def set_write_buffer_limits(self, high: Any = None, low: Any = None) -> None: ...


@functools.cache
def server() -> tuple[Server, asyncio.AbstractEventLoop]:
    """One of the embedded base, with its tokenizer and the words of the default template."""
    tokenizer, template = AutoTokenizer.from_pretrained(resources.files("fedgraft") / "assets" / "base"), DataSettings().template
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=len(tokenizer)))
    loaded: Any = SimpleNamespace(models=["base", "ada"], fitted=lambda name: None, tokenizer=tokenizer, longest=LONGEST)
    loaded.model, loaded.prompt = (
        SimpleNamespace(config=config),
        lambda turns, most: prompt_ids(example_of(turns), tokenizer, template, most),
    )
    with patch("fedgraft.serve.service.Scheduler", AtOnce):
        made = Server(Service(loaded, Limits()), None)
    made.config.load()
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a warning for each request that is none
    return made, asyncio.new_event_loop()


def requested(content: bytes) -> None:
    """All that comes over a connection; answered by 2xx, or refused by 4xx that says why. Anything else, or no end, is a failure."""
    made, loop = server()
    written = loop.run_until_complete(asyncio.wait_for(_conversation(made, loop, content), PATIENCE))
    statuses = [int(status) for status in STATUS.findall(written)]
    assert not written or statuses, written[:200]
    assert all(100 <= status < 500 for status in statuses), written[:1000]
    if not statuses:
        raise ValueError("no whole request")
    if max(statuses) >= 400:
        raise ValueError(_reason(written))


async def _conversation(made: Server, loop: asyncio.AbstractEventLoop, content: bytes) -> bytes:
    connection = Connection()
    protocol: Any = made.config.http_protocol_class(config=made.config, server_state=made.server_state, app_state={}, _loop=loop)
    try:
        protocol.connection_made(connection)
        protocol.data_received(content)
        while tasks := set(made.server_state.tasks):
            if protocol.cycle is not None and protocol.cycle.more_body:
                protocol.connection_lost(None)  # the rest of the body never comes
            _, waiting = await asyncio.wait(tasks, timeout=PATIENCE / 2)
            assert not waiting, "no answer"
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    finally:
        if protocol in made.server_state.connections:
            protocol.connection_lost(None)
    return connection.written


def _reason(written: bytes) -> str:
    """What a refusal says; that of a body or a route is JSON as OpenAI's clients read it."""
    head, _, body = written.partition(b"\r\n\r\n")
    if b"application/json" not in head or len(STATUS.findall(written)) > 1:
        return head.decode("latin-1")
    told = json.loads(body)["error"]["message"]
    assert told
    return str(told)


def _request(line: str, body: Any = None, **headers: str) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    named = {"host": "127.0.0.1:8000", "content-type": "application/json", "content-length": str(len(content)), **headers}
    return "\r\n".join([f"{line} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items()), "", ""]).encode() + content


CHAT = {
    "model": "ada",
    "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": [{"type": "text", "text": "Q"}]}],
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 3,
    "stop": ["x"],
    "stream": True,
    "stream_options": {"include_usage": True},
}
PLAIN = {"model": "base", "prompt": ["Q", "R"], "n": 1, "logit_bias": {}, "max_completion_tokens": 4}
REQUESTS = (
    _request("POST /v1/chat/completions", CHAT),
    _request("POST /v1/chat/completions", {**CHAT, "stream": False}),
    _request("POST /v1/completions", PLAIN),
    _request("POST /v1/completions", {"model": "ada", "prompt": [[5, 6], [7]], "seed": 2**64}),
    _request("GET /v1/models/ada", authorization="Bearer x"),
    _request("GET /metrics", expect="100-continue"),
    _request("GET /page.js?a=%41") + _request("GET /health"),
)


def posted(content: bytes) -> None:
    """A body with headers that fit it, to both routes."""
    for path in (b"chat/completions", b"completions"):
        head = b"POST /v1/%s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        try:
            requested(head % (path, len(content)) + content)
        except ValueError:
            if path == b"completions":
                raise


BODIES = tuple(json.dumps({"prompt": "Q", **body}).encode() for body in (CHAT, {**CHAT, "stream": False}, PLAIN))
