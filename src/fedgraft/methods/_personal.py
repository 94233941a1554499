"""What several personalised methods have in common: personal layers, and a second model of the client's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedgraft.address import as_first, as_own, layer_of
from fedgraft.aggregation.server import Ask, Server
from fedgraft.bundle import Bundle
from fedgraft.grafts.lora import Shapes
from fedgraft.methods.method import Method, Prediction, ServerHalf, Surroundings, fresh_leaves, personal_leaves
from fedgraft.training.client import Client
from fedgraft.training.local_rules import LocalRule
from fedgraft.tree import Predicate, Tree


def last_layers_personal(layers: int, local: Callable[[Predicate], LocalRule]) -> Callable[[Method, Surroundings], Method]:
    """Settles which leaves are personal: those of the last `layers` adapted decoder layers; `local` makes the rule from that predicate.

    Raises:
        ValueError: in a run whose model has too few layers for that.
    """

    def settle(method: Method, surroundings: Surroundings) -> Method:
        adapted = sorted({layer_of(key) for key in surroundings.shapes})
        if not 1 <= layers < len(adapted):
            raise ValueError(
                f"method.layers: {layers} of {len(adapted)} adapted layers can't be personal; "
                f"choose 1 to {len(adapted) - 1}, so that some are shared"
            )
        chosen = frozenset(adapted[-layers:])

        def personal(key: str) -> bool:
            return layer_of(key) in chosen

        return replace(method, personal=personal, local=local(personal))

    return settle


def twice(shapes: Shapes) -> Shapes:
    """The leaves and second ones beside them."""
    return shapes | as_own(shapes)


def with_second(method: Method, client: Client) -> Tree:
    """New leaves, and second ones that start as their copies."""
    first = fresh_leaves(method, client)
    return first | as_own(first)


def answer_second(method: Method, client: Client, package: Bundle) -> dict[str, Prediction]:
    """The second leaves are a model by themselves; where there are none yet, the shared ones predict.

    `trained` is the shared model as local training left it, before aggregation.
    """
    shared, second = package.tree("shared"), as_first(personal_leaves(method, client))
    trees = {"base": {}, "shared": shared, "trained": client.memory.tree("trained"), "personal": second or shared}
    return {name: Prediction(tree=tree, experts=[]) for name, tree in trees.items() if tree or name != "trained"}


def ask_all_to_finish(method: Method, server: Server, ask: Ask, **facts: Any) -> None:
    """Ask every client once, with the final shared leaves, to finish its own."""
    package = server.package({"shared": server.state.tree("shared")}, **facts)
    for _ in ask("finish", dict.fromkeys(server.clients, package)):
        pass


def fine_tuned_at_the_end(rounds: int, lr: float | None) -> ServerHalf:
    """Finalizes by `fine_tune` with so many rounds' worth of steps; without a rate at `training.lr`."""

    def finalize(method: Method, server: Server, ask: Ask) -> None:
        ask_all_to_finish(method, server, ask, lr=float(lr or server.lr), rounds=rounds)

    return finalize


def fine_tune(method: Method, client: Client, package: Bundle) -> Bundle:
    """Train the received leaves, on the batches that would have come next, and keep them as second ones."""
    first, rounds, lr = package.facts["round"], package.facts["rounds"], package.facts["lr"]
    assert isinstance(first, int)
    assert isinstance(rounds, int)
    assert isinstance(lr, float)
    tree, losses, tokens = package.tree("shared"), [], 0
    for number in range(first, first + rounds):
        result = client.fit(tree, round_number=number, lr=lr)
        tree, tokens = result.tree, tokens + result.tokens
        losses.append(result.loss)
    client.remember(trees={"personal": as_own(tree)})
    return Bundle(facts={"loss": sum(losses) / rounds, "tokens": tokens})
