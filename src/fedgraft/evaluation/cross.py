"""Does another client's personal model help? Clients x clients, the response loss of each one's model on each one's rows.

The only place where personal leaves leave their client: `lend` answers with them, in the process that all clients share. A site of a
deployment has no such question, so there the matrix cannot be had.
"""

from __future__ import annotations

from typing import Any

from fedgraft.aggregation.server import Ask, Server
from fedgraft.bundle import Bundle
from fedgraft.evaluation.personal import evaluation_rows
from fedgraft.evaluation.response import response_figures
from fedgraft.evaluation.settings import EvaluationSettings
from fedgraft.methods.method import Method, Prediction
from fedgraft.training.client import Client

IN_ONE_PROCESS = frozenset({"inprocess"})
"""Engines whose clients are no other parties."""


def check_cross(settings: EvaluationSettings, engine: str) -> None:
    """The matrix can be had.

    Raises:
        ValueError: clients run elsewhere.
    """
    if settings.cross and engine not in IN_ONE_PROCESS:
        raise ValueError(
            f"evaluation.cross: personal leaves never leave their site, so with engine {engine!r} no client's model can be tried on "
            "another's rows; set it to false, or run with engine.name: inprocess"
        )


def lend(method: Method, client: Client, package: Bundle) -> Bundle:
    """The client's personal model, whole; nothing where each row is blended by the client's own prompts, which are not lent."""
    model = method.answer(method, client, package)["personal"]
    if model.shares is not None:
        return Bundle()
    return Bundle(trees={"model": model.tree}, facts={"experts": [list(layer) for layer in model.experts]})


def borrow(client: Client, package: Bundle, settings: EvaluationSettings) -> Bundle:
    """The response loss of a lent model on the client's own rows."""
    experts: Any = package.facts["experts"]
    model = Prediction(tree=package.tree("model"), experts=experts)
    figures = response_figures(client, model, evaluation_rows(client, settings), settings.batch_size)
    return Bundle(facts={"loss": figures["loss"]})


def cross_losses(method: Method, server: Server, ask: Ask, clients: list[str]) -> dict[str, dict[str, float]]:
    """Client whose rows they are -> client whose personal model it is -> response loss; one lent model is in memory at a time.

    A model that cannot be lent is in nobody's row.
    """
    found: dict[str, dict[str, float]] = {client: {} for client in clients}
    for owner in clients:
        for lent in ask("lend", {owner: method.pack(method, server, owner)}):
            takers = clients if "experts" in lent.bundle.facts else []
            for reply in ask("borrow", dict.fromkeys(takers, lent.bundle)):
                loss = reply.bundle.facts["loss"]
                assert isinstance(loss, float)
                found[reply.client][owner] = loss
    return found
