"""The coordinator's half of evaluation: all that is asked after the last round, and `results.json` made of the replies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedgraft.aggregation.server import Ask, Server
from fedgraft.bundle import Bundle
from fedgraft.evaluation.cross import borrow, cross_losses, lend
from fedgraft.evaluation.personal import evaluate_client, kept_in
from fedgraft.evaluation.settings import EvaluationSettings
from fedgraft.evaluation.unseen import evaluate_unseen
from fedgraft.methods.method import Method
from fedgraft.training.client import Client


def evaluation_questions(method: Method, settings: EvaluationSettings, folder: Path) -> dict[str, Callable[[Client, Bundle], Bundle]]:
    """What a client can be asked after the last round, by name; to lend its personal model only where the recipe says so.

    What its single rows gave is kept in `folder`, on the client's site.
    """
    asked: dict[str, Callable[[Client, Bundle], Bundle]] = {
        "evaluate": partial(evaluate_client, method, settings=settings, keep=kept_in(folder)),
        "evaluate_unseen": partial(evaluate_unseen, method, settings=settings),
    }
    if settings.cross:
        asked |= {"lend": partial(lend, method), "borrow": partial(borrow, settings=settings)}
    return asked


def replies(clients: int, unseen: int, settings: EvaluationSettings) -> int:
    """How many replies `gather` waits for."""
    return clients + unseen + (clients * (clients + 1) if settings.cross else 0)


def gather(
    method: Method, server: Server, ask: Ask, clients: Sequence[str], unseen: Sequence[str], settings: EvaluationSettings
) -> dict[str, Any]:
    """Ask everybody.

    Returns:
        `split`; `clients`: client -> model -> figures; and where wanted `experts`: client -> `expert_figures`, `unseen`: client -> number
        of rows -> model -> figures, `cross`: client whose rows they are -> client whose model it is -> response loss.
    """

    def answers(question: str, names: Sequence[str]) -> Mapping[str, Bundle]:
        packages = {name: method.pack(method, server, name) for name in names}
        return {reply.client: reply.bundle for reply in ask(question, packages)}

    told = answers("evaluate", clients)
    found: dict[str, Any] = {"split": settings.split, "clients": {name: reply.facts["models"] for name, reply in told.items()}}
    if settings.experts:
        found["experts"] = {name: reply.facts["experts"] for name, reply in told.items()}
    if unseen:
        found["unseen"] = {name: reply.facts["unseen"] for name, reply in answers("evaluate_unseen", unseen).items()}
    if settings.cross:
        found["cross"] = cross_losses(method, server, ask, list(clients))
    return found
