"""Clients behind Flower: the ServerApp's half over a `Grid`, and the ClientApp's half, a thin function from message to bytes and back.

Every question is one message per client. Replies are pulled one at a time, in the order of the packages: those that come early wait at the
SuperLink, so the coordinator holds one reply at a time whatever the number of clients. A late reply is never pulled.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

from fedgraft.aggregation.server import Reply
from fedgraft.bundle import Bundle
from fedgraft.engine.card import Card
from fedgraft.engine.engine import Listener, Traffic
from fedgraft.engine.wire import ECHOED, Frame
from fedgraft.training.client import MemoryStore

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid

Handle: TypeAlias = Callable[[bytes, int | None], bytes]
"""(request, the node's partition number if it was given one) -> response; `hosting.Host.handle` is one."""

QUERY = "query"
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
"""Environment in which neither Flower nor Ray calls home."""
POLL_SECONDS, POLL_MOST, POLL_GROWTH = 0.02, 0.5, 1.3
LINGER = 30.0  # seconds that a message is kept beyond its deadline, so that lateness is told as such and not as a message that is gone
FOREVER = float(60 * 60 * 24 * 30)
"""Seconds that a message without a deadline is kept."""


def prepare(*packages: str, setting: str = "engine.name", without: str = "inprocess") -> None:
    """Check that these packages are there, and keep them from calling home; to be called before Flower is imported.

    Args:
        packages: by the names that they are imported by.
        setting: the key of the recipe that needs them.
        without: a value of it that doesn't.

    Raises:
        ValueError: one is not installed.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for package in packages:
        if find_spec(package) is None:
            raise ValueError(f"{setting}: needs {package}, which is not installed; pip install 'fedgraft[flower]', or set it to {without}")


@dataclass(kw_only=True)
class GridEngine:
    """Asks the clients behind the nodes of a grid. `introduce` comes first."""

    grid: Grid
    run: str
    """The run's id, by which sites find the memories that belong to it."""
    recipe: Mapping[str, Any]
    """The run's recipe, which travels with every request."""
    listener: Listener
    wanted: int
    wait_seconds: float
    deadline_seconds: float | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    """Node -> the client that its key belongs to, where nodes prove themselves by keys; a node can't be another client then."""
    admitted: Callable[[str], bool] = lambda client: True
    """Whether a client is still let in; one that is not has left, whatever it may still send."""
    departed: Sequence[Card] = ()
    """Clients of the run that had left when it was resumed, as they once introduced themselves."""
    store: MemoryStore | None = None
    alive: Callable[[], None] = lambda: None
    """Raises once there is nothing left to wait for; asked while waiting."""
    asked: int = 0
    committed: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    _cards: dict[str, Card] = field(default_factory=dict)
    _nodes: dict[str, int] = field(default_factory=dict)
    _greeted: dict[int, str] = field(default_factory=dict)
    """Node -> message id of the request to introduce itself, "" once that was answered."""
    _refusals: dict[int, str] = field(default_factory=dict)
    _begun: bool = False

    @property
    def cards(self) -> list[Card]:
        """The clients' cards, sorted by name."""
        return [self._cards[name] for name in sorted(self._cards)]

    @property
    def left(self) -> frozenset[str]:
        """Clients of the run that are no longer let in."""
        return frozenset(name for name in self._cards if not self.admitted(name))

    def introduce(self) -> None:
        """Wait until as many clients as wanted have introduced themselves.

        Raises:
            ValueError: they have not in time, or two nodes are the same client.
        """
        until, pause = time.monotonic() + self.wait_seconds, POLL_SECONDS
        self._cards.update((card.name, card) for card in self.departed)
        while len(self._cards) < self.wanted:
            self.alive()
            self._greet()
            if len(self._cards) < self.wanted and time.monotonic() > until:
                raise ValueError(self._missing())
            time.sleep(pause)
            pause = min(pause * POLL_GROWTH, POLL_MOST)
        self._begun = True

    def ask(self, question: str, packages: dict[str, Bundle]) -> Iterator[Reply]:
        """Put one question to many clients at once; replies come in the order of the packages, a lost or failed client is absent."""
        facts = {"clients": sorted(self._cards), "question": question, "asked": self.asked, "committed": self.committed}
        self.asked += 1
        self._greet()
        online, sent = set(self.grid.get_node_ids()), dict[str, str]()
        for client, package in packages.items():
            if not self.admitted(client):
                continue
            content = package.encode()
            node = self._nodes.get(client, 0)  # 0: it had left, and has been let in again since
            number = self._push(node, Frame(kind="ask", facts={**facts, "client": client}, content=content)) if node in online else ""
            if number:
                sent[client] = number
                self.traffic.down += len(content)
            else:
                self.listener.lost(client, f"client {client!r}: its node {node} is not connected")
        until = None if self.deadline_seconds is None else time.monotonic() + self.deadline_seconds
        for client, number in sent.items():
            if (reply := self._reply({**facts, "client": client}, number, until)) is not None:
                yield reply

    def close(self) -> None:
        """Sites keep what they hold until another run comes, so that this one can be resumed at once."""

    def _reply(self, asked: Mapping[str, Any], number: str, until: float | None) -> Reply | None:
        """The client's reply once it has come; None, and the listener knows why, if there is none to be used."""
        client = str(asked["client"])
        message = self._pull(client, number, until)
        if not self.admitted(client):
            return None
        if message is None:
            self.listener.lost(client, f"client {client!r} did not answer within {self.deadline_seconds:g} s")
            return None
        try:
            frame = _frame(message, f"the reply of client {client!r}")
            if frame.kind == "failed":
                self.listener.failed(client, frame.reason)
                return None
            _expect(frame, "reply", client)
            if [frame.facts.get(name) for name in ECHOED] != [{"run": self.run, **asked}[name] for name in ECHOED]:
                raise ValueError(f"client {client!r}: a reply to another request than this one; an old one may have been sent again")
            bundle = Bundle.decode(frame.content, f"the reply of client {client!r}")
        except ValueError as error:
            self.listener.lost(client, str(error))
            return None
        self.traffic.up += len(frame.content)
        return Reply(client=client, bundle=bundle)

    def _push(self, node: int, frame: Frame) -> str:
        """Send one request; its message id, "" if the SuperLink didn't take it. One at a time, so that one package is in memory."""
        from flwr.app import Message

        life = {"join": self.wait_seconds, "ask": self.deadline_seconds}.get(frame.kind)
        whole = Frame(kind=frame.kind, facts={"run": self.run, "recipe": dict(self.recipe), **frame.facts}, content=frame.content)
        message = Message(whole.records(), node, QUERY, ttl=FOREVER if life is None else life + LINGER)
        return next((str(number) for number in self.grid.push_messages([message]) if number), "")

    def _pull(self, client: str, number: str, until: float | None) -> Message | None:
        pause = POLL_SECONDS
        while self.admitted(client):
            for message in self.grid.pull_messages([number]):
                return message
            self.alive()
            left = POLL_MOST if until is None else until - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(pause, left))
            pause = min(pause * POLL_GROWTH, POLL_MOST)
        return None

    def _greet(self) -> None:
        """Ask unknown nodes to introduce themselves and hear those that have, without waiting for any."""
        online = set(self.grid.get_node_ids())
        for node in sorted(online - self._greeted.keys()):
            self._greeted[node] = self._push(node, Frame(kind="join"))
        for node, number in list(self._greeted.items()):
            for message in self.grid.pull_messages([number]) if number else ():
                self._greeted[node] = ""
                try:
                    frame = _frame(message, f"node {node}")
                    _expect(frame, "card", "")
                    self._meet(node, Card.of(frame.facts.get("card")), online)
                except _TwiceError:
                    raise
                except ValueError as error:
                    self._refusals[node] = str(error)
                    self.listener.warn(f"node {node} cannot take part: {error}")

    def _meet(self, node: int, card: Card, online: set[int]) -> None:
        """A client has introduced itself, for the first time or after its node was gone."""
        if self.names and self.names.get(node) != card.name:
            raise ValueError(f"it says it is client {card.name!r}, its key is that of {self.names.get(node, 'no site')!r}")
        known, before = self._cards.get(card.name), self._nodes.get(card.name)
        if known is None and self._begun:
            raise ValueError(f"client {card.name!r} came after the run began and is not part of it")
        if before is not None and before in online and before != node:
            both = f"nodes {before} and {node} both say they are client {card.name!r}"
            if not self._begun:
                raise _TwiceError(f"{both}; stop one of them, or give its rows the name of another client")
            raise ValueError(f"{both}; the run goes on with {before}")
        if known is not None and (known.data_digest, known.base_digest) != (card.data_digest, card.base_digest):
            raise ValueError(f"client {card.name!r} came back with other data or another base model than it had; restore them")
        self._cards[card.name], self._nodes[card.name] = card, node

    def _missing(self) -> str:
        come = ", ".join(sorted(self._cards)) or "none"
        silent = sum(number != "" for number in self._greeted.values())
        further = f"; {silent} nodes are connected and have not answered" if silent else ""
        refusals = "".join(f"\nnode {node}: {reason}" for node, reason in self._refusals.items())
        return (
            f"{len(self._cards)} of {self.wanted} clients have come within {self.wait_seconds:g} s ({come}){further}; "
            f"start the others' sites, raise engine.wait_seconds, or lower engine.clients{refusals}"
        )


class _TwiceError(ValueError):
    """Two nodes are one client."""


def client_app(handle: Handle) -> ClientApp:
    """A ClientApp that hands each message's bytes to `handle`, and nothing else."""
    from flwr.app import Message
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    def answer(message: Message, context: Context) -> Message:
        request = Frame.of_records(message.content, "the coordinator's request").encode()
        partition = context.node_config.get("partition-id")
        response = Frame.decode(handle(request, None if partition is None else int(partition)), "the site's response")
        return Message(response.records(), reply_to=message)

    return app


def _frame(message: Message, source: str) -> Frame:
    """What came back.

    Raises:
        ValueError: an error of Flower's in its place, or it is damaged; names `source`.
    """
    if message.has_error():
        reason = ((message.error.reason or "").strip() or "no reason given").splitlines()[-1]
        raise ValueError(f"{source}: Flower reports error {message.error.code} ({reason}); the site's log says more")
    return Frame.of_records(message.content, source)


def _expect(frame: Frame, kind: str, client: str) -> None:
    if frame.kind == "refused":
        raise ValueError(f"{f'client {client!r}: ' if client else ''}{frame.reason}")
    if frame.kind != kind or frame.facts.get("client", "") != client:
        raise ValueError(f"{f'client {client!r}: ' if client else ''}a response of another kind than asked for ({frame.kind!r})")
