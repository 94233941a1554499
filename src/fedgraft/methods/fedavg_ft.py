"""FedAvg with fine-tuning (as in Collins et al. 2021, section 5): FedAvg, then every client trains the final leaves on its own rows."""

from __future__ import annotations

from fedgraft.address import as_own
from fedgraft.aggregation.server import Ask, Server
from fedgraft.bundle import Bundle
from fedgraft.methods._personal import answer_second, twice
from fedgraft.methods.method import Method
from fedgraft.training.client import Client
from fedgraft.training.personal_rules import first_alone, own_leaves


def build(rounds: int = 1, lr: float | None = None) -> Method:
    """FedAvg's rounds; then, once and by every client, `rounds` times `training.steps` optimiser steps from the final shared leaves.

    The fine-tuned leaves are the client's own and are never sent. A client whose fine-tuning is lost predicts with the shared leaves.

    Args:
        rounds: rounds' worth of local steps, on the batches that would have come next.
        lr: learning rate of the fine-tuning; empty: `training.lr`, since the rounds' cosine has ended by then.

    Raises:
        ValueError: nothing to train.
    """
    if rounds < 1 or (lr is not None and lr <= 0):
        raise ValueError(f"method.rounds, method.lr: {rounds} rounds at {lr} train nothing; choose at least 1 round and a positive rate")

    def finalize(method: Method, server: Server, ask: Ask) -> None:
        package = server.package({"shared": server.state.tree("shared")}, lr=float(lr or server.lr), rounds=rounds)
        for _ in ask("finish", dict.fromkeys(server.clients, package)):
            pass

    return Method(
        leaves=twice,
        personal=own_leaves,
        fresh=lambda method, client: {},
        local=first_alone,
        finalize=finalize,
        finish=fine_tune,
        answer=answer_second,
    )


def fine_tune(method: Method, client: Client, package: Bundle) -> Bundle:
    """Train the received leaves and keep them."""
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
