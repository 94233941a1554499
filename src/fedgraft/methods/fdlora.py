"""FDLoRA (Qi et al. 2024, arXiv 2406.07925): a shared and an own LoRA, fused by two weights that a search without gradients finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fedgraft.address import as_first
from fedgraft.aggregation.server_steps import nesterov
from fedgraft.bundle import Bundle
from fedgraft.methods._personal import answer_second, ask_all_to_finish, twice, with_second
from fedgraft.methods.method import Method, Prediction, fresh_leaves, personal_leaves, train_round
from fedgraft.settings import Decay
from fedgraft.training.client import Client
from fedgraft.training.measure import loss_on
from fedgraft.training.personal_rules import own_leaves, restarted
from fedgraft.tree import Tree, partition

BOUND = 1.5
"""Largest weight either way, as in LoraHub."""


def build(
    server_lr: PositiveFloat = 0.7,
    beta: Decay = 0.9,
    sync: NonNegativeInt = 5,
    weights: tuple[float, float] | None = None,
    rows: PositiveInt = 16,
    evaluations: PositiveInt = 40,
    l1: NonNegativeFloat = 0.05,
) -> Method:
    """Clients train the shared LoRA as in FedAvg and an own one alone; the server steps with Nesterov's momentum; a fusion ends the run.

    Fused are the factors, g A_w + p A_v and g B_w + p B_v, with the g and p of the least loss on some *validation* rows plus l1 times the
    mean of |g| and |p|, found by Nelder-Mead from either LoRA alone and none.

    Two LoRAs of which one travels, an optimiser on the clients and one on the server, and a fusion of parameters by few shots without
    gradients are the paper's. We could not see its formulas, so the rest is our reading: the server's step and its rates are DiLoCo's
    (arXiv 2311.08105), the fusion's aim and bounds LoraHub's (arXiv 2307.13269); the own LoRA trains beside the rounds, where the paper
    begins with it and starts the shared one from the mean; clients are weighted by examples. With weights [1, 0], a rate of 1 and no
    momentum this is FedAvg.

    Args:
        server_lr: the server's learning rate.
        beta: share of the server's momentum that is kept from round to round.
        sync: the own LoRA starts anew from the received shared one after every so many rounds; 0: never.
        weights: g and p for all clients, in the place of a search.
        rows: how many validation rows the search may use; where `evaluation.split` is `validation`, they are seen twice.
        evaluations: how many pairs of weights the search may try.
        l1: weight of the mean of |g| and |p|.
    """

    def finish(method: Method, client: Client, package: Bundle) -> Bundle:
        """Find the weights on validation rows and keep them."""
        loss, fused = loss_on(client, client.data.validation[:rows]), fusion(method, client, package.tree("shared"))
        found = search(lambda g, p: loss(fused(g, p)) + l1 * (abs(g) + abs(p)) / 2, evaluations)
        client.remember(trees={}, facts={"weights": list(found)})
        return Bundle()

    def answer(method: Method, client: Client, package: Bundle) -> dict[str, Prediction]:
        """As of two models, with the fused one as the product; a client whose search was lost predicts with the shared leaves."""
        found: Any = weights or client.memory.facts.get("weights", (1.0, 0.0))
        tree = fusion(method, client, package.tree("shared"))(*found)
        return answer_second(method, client, package) | {"personal": Prediction(tree=tree, experts=[])}

    return Method(
        leaves=twice,
        personal=own_leaves,
        local=restarted(sync),
        passes=2,
        step=nesterov(beta=beta, lr=server_lr),
        finalize=None if weights else ask_all_to_finish,
        fresh=with_second,
        train=train_round if weights else train,
        finish=finish,
        answer=answer,
    )


def train(method: Method, client: Client, package: Bundle) -> Bundle:
    """A round as ever, for a client that has rows to search on.

    Raises:
        ValueError: it has none.
    """
    if not client.data.validation:
        raise ValueError(
            f"client {client.name!r} has no validation rows, on which fdlora finds its weights; "
            "give it some (data.validation_rows, or rows of that split), or set method.weights"
        )
    return train_round(method, client, package)


def fusion(method: Method, client: Client, shared: Tree) -> Callable[[float, float], Tree]:
    """(g, p) -> g shared + p own; rows that are trained in full, as the router's, keep their pretrained part whole."""
    own = as_first(personal_leaves(method, client))
    rows = partition(fresh_leaves(method, client), lambda key: key in shared and not key.endswith((".A", ".B")))[0]

    def fused(g: float, p: float) -> Tree:
        mixed = {key: g * leaf + p * own[key] for key, leaf in shared.items()}
        return mixed | {key: mixed[key] + (1 - g - p) * leaf for key, leaf in rows.items()}

    return fused


def search(loss: Callable[[float, float], float], evaluations: int) -> tuple[float, float]:
    """The weights of the least loss among those that Nelder-Mead tries, starting from the shared LoRA, the own one, and none."""
    from scipy.optimize import minimize

    corners = [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]
    options = {"maxfev": evaluations, "initial_simplex": corners}
    found = minimize(lambda pair: loss(*pair), corners[0], method="Nelder-Mead", bounds=[(-BOUND, BOUND)] * 2, options=options)
    return float(found.x[0]), float(found.x[1])
