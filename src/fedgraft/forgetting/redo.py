"""The merges of a run done again without one client, from the replies that were kept.

Two runs are merged side by side. The first has all replies, and must come after each round to the state that the run had: this shows that
nothing is missing. The second lacks the client. What another client changed was a change of the first one's package, so it is the same
change of the second one's that counts there: reply + (package of the second - package of the first), leaf by leaf. Else what the client
had sent in all rounds but the last would stay in the leaves from which the others' replies started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from fedgraft.aggregation.server import Ask, Reply
from fedgraft.bundle import Bundle
from fedgraft.coordinating import server_of
from fedgraft.hosting import training_of
from fedgraft.kept import Kept
from fedgraft.methods.method import Method, settled
from fedgraft.moe.skeleton import skeleton
from fedgraft.recipe import Recipe
from fedgraft.tree import Tree

Asks: TypeAlias = Mapping[int, Mapping[str, Path]]
Sent: TypeAlias = list[dict[str, Bundle]]


@dataclass(frozen=True, kw_only=True)
class Redone:
    """The run without the client."""

    state: Bundle
    """After the last round."""
    short: list[int]
    """Rounds with fewer replies left than the merge needs, which leave the state as it was."""
    chosen_before: bool
    """Something was decided before the first round, with the client's word in it, and stays."""


def refuse(method: Method) -> None:
    """Let only a method pass whose merges can be done again.

    Raises:
        ValueError: rows are pooled, or replies are merged whole.
    """
    if method.pooled:
        raise ValueError(
            "its method trains on all clients' rows at one site, so no reply is one client's; start a new run without the rows"
        )
    if not method.merges_changes:
        raise ValueError(
            "its method merges whole factors, not changes of them, so the others' replies can't be freed of what they started from; "
            "start a new run without the client's rows"
        )


def redo(recipe: Recipe, clients: list[str], kept: Kept, end: Bundle, client: str, into: Kept) -> Redone:
    """Merge all rounds again without a client.

    Args:
        recipe: the run.
        clients: who trained in it, sorted.
        kept: its replies.
        end: its state.
        client: who is left out.
        into: takes the others' replies as they are merged now.

    Raises:
        ValueError: the replies kept do not lead to the run's state; the recipe's method or base can't be built.
    """
    rounds = end.facts["round"]
    assert isinstance(rounds, int)
    method = settled(recipe.build_method(), skeleton(recipe.model), recipe.lora, clients)
    training = training_of(recipe, method, len(clients))
    whole, rest = (server_of(recipe, training, clients, _nothing_fresh) for _ in range(2))
    whole.state = rest.state = kept.state()
    into.opened(rest.state)
    short = []
    for number in range(rounds):
        asks, sent = kept.asks(number), Sent()
        whole.round = rest.round = number
        method.round(method, whole, _asking(asks, sent, _as_it_was))
        kept.refuse_other(number, whole.state)
        into.round(number)
        method.round(method, rest, _asking(asks, Sent(), _without(client, sent), into))
        into.merged(rest.state)
        heard = max((len(replies) for replies in asks.values()), default=0)
        left = max((len(replies.keys() - {client}) for replies in asks.values()), default=0)
        short += [number] if left < heard and left < method.merge.least else []
    facts = {**rest.state.facts, "round": rounds, "asked": end.facts["asked"]}
    return Redone(state=Bundle(trees=rest.state.trees, facts=facts), short=short, chosen_before=bool(kept.state().facts))


def carried(reply: Bundle, before: Bundle, after: Bundle) -> Bundle:
    """The reply to the package `before`, as if its change had been made to the package `after`."""
    shared, starts, ends = dict(reply.tree("shared")), before.tree("shared"), after.tree("shared")
    for key, leaf in shared.items():
        if key in starts and key in ends and not torch.equal(starts[key], ends[key]):
            shared[key] = (leaf.double() + (ends[key].double() - starts[key].double())).to(leaf.dtype)
    return Bundle(trees={**reply.trees, "shared": shared}, facts=reply.facts)


def _as_it_was(number: int, reply: Reply, packages: Mapping[str, Bundle]) -> Reply | None:
    return reply


def _without(client: str, sent: Sent) -> Callable[[int, Reply, Mapping[str, Bundle]], Reply | None]:
    """None in the place of the client's replies; the others' as changes of what they are sent now."""

    def use(number: int, reply: Reply, packages: Mapping[str, Bundle]) -> Reply | None:
        if reply.client == client:
            return None
        return Reply(client=reply.client, bundle=carried(reply.bundle, sent[number][reply.client], packages[reply.client]))

    return use


def _asking(asks: Asks, sent: Sent, use: Callable[[int, Reply, Mapping[str, Bundle]], Reply | None], into: Kept | None = None) -> Ask:
    """An `ask` that answers with the replies kept of one round, in the order of the packages; notes what was sent."""

    def answers(number: int, packages: dict[str, Bundle]) -> Iterator[Reply]:
        replies = asks.get(number, {})
        for name in packages:
            if name in replies:
                used = use(number, Reply(client=name, bundle=Bundle.load(replies[name])), packages)
                if used is not None:
                    yield used

    def ask(question: str, packages: dict[str, Bundle]) -> Iterator[Reply]:
        number = len(sent)
        sent.append(packages)
        found = answers(number, packages)
        yield from found if into is None else into.keeping(question, found)

    return ask


def _nothing_fresh() -> Tree:
    raise AssertionError("a run that is merged again has begun")
