"""What several methods of federated LoRA have in common: a rank per client, whole factors to the merge, residuals in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from fedgraft.aggregation.low_rank_merges import cut
from fedgraft.aggregation.merges import Update
from fedgraft.aggregation.server import Reply, Server
from fedgraft.bundle import Bundle
from fedgraft.grafts.lora import Shapes
from fedgraft.methods.method import Method, Surroundings
from fedgraft.tree import Tree

Ranks: TypeAlias = list[int] | dict[str, int] | None
"""Ranks dealt to the clients in turn, or by client; none: `lora.rank` for all."""

BY_PRODUCT = "needs its own, which takes whole pairs and not the changes of A and B"
"""Why `federation.merge` cannot take the place of a method's merge."""


def ranks_of(ranks: Ranks, surroundings: Surroundings) -> dict[str, int]:
    """The rank of every client.

    Raises:
        ValueError: a rank above `lora.rank`, which is the server's, or below 1; a client without a rank; a rank of nobody.
    """
    clients, most = surroundings.clients, surroundings.lora.rank
    if isinstance(ranks, dict) and set(ranks) != set(clients):
        wrong = f"no rank for {', '.join(sorted(set(clients) - set(ranks))) or 'nobody'}, "
        wrong += f"a rank for {', '.join(sorted(set(ranks) - set(clients))) or 'nobody'} that is no client"
        raise ValueError(f"method.ranks: {wrong}; the clients are {', '.join(clients)}")
    if ranks is not None and not ranks:
        raise ValueError("method.ranks: an empty list; leave it out to give every client lora.rank")
    dealt = ranks if isinstance(ranks, dict) else {name: (ranks or [most])[at % len(ranks or [most])] for at, name in enumerate(clients)}
    for name, rank in dealt.items():
        if not 1 <= rank <= most:
            raise ValueError(f"method.ranks: rank {rank} of client {name!r}; choose 1 to lora.rank, which is {most}")
    return dealt


def dense_residuals(shapes: Shapes) -> Shapes:
    """The residuals beside these pairs, dense."""
    heads = [key.removesuffix(".A") for key in shapes if key.endswith(".A")]
    return {f"{head}.residual": (shapes[f"{head}.B"][0], shapes[f"{head}.A"][1]) for head in heads}


def cut_shapes(shapes: Shapes, rank: int) -> Shapes:
    """The shapes of leaves after `cut`."""
    found = dict(shapes)
    for key, shape in shapes.items():
        if key.endswith(".A") and shape[0] > rank:
            found |= {key: (rank, shape[1]), f"{key[:-2]}.B": (shapes[f"{key[:-2]}.B"][0], rank)}
    return found


def pack_cut(ranks: dict[str, int]) -> Callable[[Method, Server, str], Bundle]:
    """Each client receives the pairs cut to its rank."""

    def pack(method: Method, server: Server, client: str) -> Bundle:
        return server.package({"shared": cut(server.state.tree("shared"), ranks[client])})

    return pack


def absorb_factors(method: Method, server: Server, replies: Iterator[Reply]) -> None:
    """As FedAvg's, but the merge gets whole leaves in place of changes; no reply leaves the state as it is."""

    def updates() -> Iterator[Update]:
        for reply in replies:
            examples = reply.bundle.facts["examples"]
            assert isinstance(examples, int)
            leaves: Tree = {key: leaf.double() for key, leaf in reply.bundle.tree("shared").items()}
            yield Update(client=reply.client, delta=leaves, examples=examples)

    merged = method.merge.run(updates())
    if merged:
        server.state = method.step(server.state, merged)
