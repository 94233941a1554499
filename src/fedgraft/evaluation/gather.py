"""The coordinator's half of evaluation: all that is asked after the last round, and `results.json` made of the replies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from fedgraft.aggregation.replies import Due, any_leaves
from fedgraft.aggregation.server import Ask, Server
from fedgraft.bundle import Bundle
from fedgraft.evaluation.cross import borrow, cross_losses, lend
from fedgraft.evaluation.personal import evaluate_client, kept_in
from fedgraft.evaluation.settings import EvaluationSettings
from fedgraft.evaluation.unseen import evaluate_unseen
from fedgraft.methods.method import Method, questions
from fedgraft.training.client import Client

Question: TypeAlias = Callable[[Client, Bundle], Bundle]


def site_questions(method: Method, settings: EvaluationSettings, folder: Path, lends: bool) -> dict[str, Question]:
    """All that a client can be asked, by name.

    Whatever is not an evaluation on test rows finds the client without them.

    Args:
        method: settled for the run.
        settings: what is measured.
        folder: where what single rows gave is kept, on the client's site.
        lends: whether clients may lend their personal models at all; they do where the recipe says so.
    """
    measuring: dict[str, Question] = {
        "evaluate": partial(evaluate_client, method, settings=settings, keep=kept_in(folder)),
        "evaluate_unseen": partial(evaluate_unseen, method, settings=settings),
    }
    lending: dict[str, Question] = {"lend": partial(lend, method), "borrow": partial(borrow, settings=settings)}
    measuring |= lending if settings.cross and lends else {}
    if settings.split == "test":
        return {name: without_test_rows(question) for name, question in questions(method).items()} | measuring
    return {name: without_test_rows(question) for name, question in (questions(method) | measuring).items()}


def due_replies(method: Method, longest: float | None = None, trained: tuple[str, ...] = ("examples",)) -> Mapping[str, Due]:
    """What the reply to each question must hold; one to any other question holds no leaves.

    Args:
        method: settled for the run.
        longest: `federation.norm_limit`.
        trained: facts that a reply to `train` cannot do without.
    """
    return {
        "graft": Due(leaves=method.grown),
        "train": Due(leaves=method.sent, facts=trained, longest=longest),
        "evaluate": Due(facts=("models",)),
        "evaluate_unseen": Due(facts=("unseen",)),
        "lend": Due(leaves=any_leaves),
    }


def without_test_rows(question: Question) -> Question:
    """The question to a client that has none."""

    def asked(client: Client, package: Bundle) -> Bundle:
        client.data = client.data.sealed()
        return question(client, package)

    return asked


def replies(clients: int, unseen: int, settings: EvaluationSettings) -> int:
    """How many replies `gather` waits for."""
    new = clients if settings.unseen.clients == "all" else unseen
    return clients + new + (clients * (clients + 1) if settings.cross else 0)


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
        found["experts"] = {name: reply.facts["expert_figures"] for name, reply in told.items() if "expert_figures" in reply.facts}
    if new := clients if settings.unseen.clients == "all" else unseen:
        found["unseen"] = {name: reply.facts["unseen"] for name, reply in answers("evaluate_unseen", new).items()}
    if settings.cross:
        found["cross"] = cross_losses(method, server, ask, list(clients))
    return found
