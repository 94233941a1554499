"""A grid in memory: real Flower messages and a real ClientApp, no server, no Ray."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedgraft import hosting, session
from fedgraft.engine.flower import client_app
from fedgraft.engine.wire import Frame
from fedgraft.hosting import Host
from fedgraft.moe.load import load_base
from tests.methods.conftest import place, start

__all__ = ["place", "start"]

BASES: dict[Any, Any] = {}
Fate = Callable[[Frame], str]
"""What becomes of a request: "" (it is answered), "late" (answered in vain), "down" (never seen), "error", or "damaged"."""


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base is read once and copied for every process that there would be; no pages are drawn."""

    def copied(settings: Any) -> Any:
        if settings not in BASES:
            BASES[settings] = load_base(settings)
        return copy.deepcopy(BASES[settings])

    monkeypatch.setattr(hosting, "load_base", copied)
    monkeypatch.setattr(session, "leave_page", lambda folder: None)


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower makes messages only inside a task."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def carried(message: Message) -> Message:
    """The message as it comes out at the other end of Flower's own wire format."""
    number = message.object_id
    contents = {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
    return inflate_object_from_contents(number, contents)


@dataclass
class Node:
    """A SuperNode with its ClientApp."""

    app: Any
    partition: int

    def answer(self, message: Message) -> Message:
        context = Context(run_id=1, node_id=1, node_config={"partition-id": self.partition}, state=RecordDict(), run_config={})
        return self.app(message, context)


@dataclass
class FakeGrid:
    """Answers while messages are pushed; `fate` decides what becomes of each request."""

    nodes: dict[int, Node] = field(default_factory=dict)
    fate: Fate = lambda frame: ""
    replies: dict[str, Message] = field(default_factory=dict)
    requests: list[Frame] = field(default_factory=list)
    count: int = 0

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterator[str]:
        for message in messages:
            self.count += 1
            number = f"message-{self.count}"
            there = carried(message)
            there.metadata.__dict__["_message_id"] = number
            request = Frame.of_records(there.content)
            self.requests.append(request)
            fate, node = self.fate(request), self.nodes[message.metadata.dst_node_id]
            if fate == "error":
                self.replies[number] = Message(Error(code=0, reason="Traceback\nKeyError: 'oops'"), reply_to=there)
            elif fate != "down":
                reply = carried(node.answer(there))
                if fate == "damaged":
                    _flip(reply)
                if fate != "late":
                    self.replies[number] = reply
            yield number

    def pull_messages(self, numbers: Iterable[str]) -> list[Message]:
        return [self.replies.pop(number) for number in numbers if number in self.replies]


def _flip(reply: Message) -> None:
    """One bit of the last leaf."""
    array = reply.content["body"]["bundle"]
    array.data = array.data[:-1] + bytes([array.data[-1] ^ 1])


@pytest.fixture
def grid_of(tmp_path: Path) -> Callable[..., FakeGrid]:
    """`grid_of(number of nodes, fate)`: nodes spread over two hosts, each with a folder of its own for memories."""

    def build(nodes: int = 3, fate: Fate = lambda frame: "", folder: Path = tmp_path / "sites") -> FakeGrid:
        hosts = [Host(memories=lambda run, site=site: folder / site / run) for site in ("north", "south")]
        return FakeGrid({100 + at: Node(client_app(hosts[at % 2].handle), at) for at in range(nodes)}, fate)

    return build
