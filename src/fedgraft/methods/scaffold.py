"""SCAFFOLD (Karimireddy et al. 2020): FedAvg whose clients correct each gradient by how their data differ from the others'."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedgraft.aggregation.merges import by_examples, uniform
from fedgraft.aggregation.replies import as_packed
from fedgraft.aggregation.server import Reply, Server
from fedgraft.bundle import Bundle
from fedgraft.grafts.lora import Shapes
from fedgraft.methods.method import Method, absorb_updates, train_round
from fedgraft.training.client import Client
from fedgraft.training.fit import Fit
from fedgraft.training.local_rules import kept_moments
from fedgraft.tree import Tree


def build(weighted: bool = False) -> Method:
    """Every gradient g becomes g - c_i + c before clipping and AdamW; c_i and c, of the size of the leaves, double the bytes both ways.

    After a round c_i is the mean of its raw gradients, which for plain SGD is the paper's c_i - c + (w_g - w_i) / (steps lr), and
    c += (1 / clients) sum of the changes of c_i. A reply that was lost is made up for in the client's next one, so that c stays the mean of
    the c_i whatever is lost.

    Args:
        weighted: leaves are averaged by examples, as in the code released with FLEx, while c remains the plain mean it is in the paper.
    """
    return Method(
        merge=by_examples if weighted else uniform,
        pack=pack,
        absorb=absorb,
        train=train,
        wire_copies=2,
        sent=with_control,
        needs_mean="corrects gradients by a mean over the clients, which only a mean of their leaves agrees with",
    )


def pack(method: Method, server: Server, client: str) -> Bundle:
    """The shared leaves, c, and the last round in which this client's reply was heard."""
    heard: Any = server.state.facts.get("heard", {})
    control = {key: leaf.float() for key, leaf in server.state.tree("control").items()}
    return server.package({"shared": server.state.tree("shared"), "control": control}, heard=heard.get(client))


def absorb(method: Method, server: Server, replies: Iterator[Reply]) -> None:
    """FedAvg, and c moves by the changes of the c_i."""
    control, heard = dict(server.state.tree("control")), dict[str, int]()

    def passing() -> Iterator[Reply]:
        for reply in replies:
            for key, change in reply.bundle.tree("control").items():
                moved = change.double() / len(server.clients)
                control[key] = control[key] + moved if key in control else moved
            heard[reply.client] = server.round
            yield reply

    absorb_updates(method, server, passing())
    before: Any = server.state.facts.get("heard", {})
    server.state = Bundle(trees={**server.state.trees, "control": control}, facts={**server.state.facts, "heard": {**before, **heard}})


def with_control(shapes: Shapes, package: Bundle, reply: Bundle) -> Mapping[str, Shapes]:
    """The shared leaves and as many changes of c_i."""
    shared = as_packed(shapes, package, reply)["shared"]
    return {"shared": shared, "control": shared}


def train(method: Method, client: Client, package: Bundle) -> Bundle:
    """FedAvg's round with corrected gradients; `counted` is the c_i that the server's c holds."""
    memory, steps = client.memory, 0
    own = memory.tree("control")
    counted = own if memory.facts.get("trained_in") == package.facts["heard"] else memory.tree("counted")
    correction = _difference(package.tree("control"), {key: leaf.float() for key, leaf in own.items()})
    total: Tree = {}

    def correct(leaves: Mapping[str, Tensor]) -> None:
        nonlocal steps
        steps += 1
        for key, leaf in leaves.items():
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad  # an expert that no token reached has none
            total[key] = total[key] + gradient if key in total else gradient.clone()
            leaf.grad = gradient + correction[key].to(leaf.device) if key in correction else gradient

    def corrected(client: Client, start: Mapping[str, Tensor], round_number: int, lr: float) -> Fit:
        return client.fit(start, round_number=round_number, lr=lr, on_gradients=correct, moments=kept_moments(client))

    reply = train_round(dataclasses.replace(method, local=corrected), client, package)
    gradient = {key: leaf.cpu().double() / steps for key, leaf in total.items()}
    change = {key: leaf.float() for key, leaf in _difference(gradient, counted).items()}
    control = {key: leaf.double() + counted[key] if key in counted else leaf.double() for key, leaf in change.items()}  # as the server sums
    client.remember(trees={"control": control, "counted": counted}, facts={"trained_in": package.facts["round"]})
    return Bundle(trees={**reply.trees, "control": change}, facts=reply.facts)


def _difference(left: Tree, right: Tree) -> Tree:
    """left - right, where an absent leaf is 0."""
    both = {key: leaf - right[key] if key in right else leaf for key, leaf in left.items()}
    return both | {key: -leaf for key, leaf in right.items() if key not in left}
