"""Clients that the federation never asked: how good are its shared leaves for them, at once and after a few rows of their own?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedgraft import plugins, seeds
from fedgraft.aggregation.replies import no_leaves
from fedgraft.bundle import Bundle
from fedgraft.evaluation.personal import evaluation_rows, measure, wanted_models
from fedgraft.evaluation.settings import EvaluationSettings, UnseenSettings
from fedgraft.methods.method import Method
from fedgraft.training.client import Client, Report, unheard

STEPS = 1000
"""Parts of a part, as progress counts in whole numbers."""


def held_out(settings: UnseenSettings, rows: Mapping[str, int], method: Method, seed: int) -> list[str]:
    """The clients that are held out, among all, in their order; `rows` are the training rows of each.

    Raises:
        ValueError: a name of no client, nobody left to federate, too few training rows, or a method that has no model before its first row.
    """
    names, wanted = list(rows), settings.clients
    if wanted == "all" and method.sent is not no_leaves:
        raise ValueError(
            "evaluation.unseen.clients: all: the shared leaves learn from all clients here; set method.frozen_shared, or a number"
        )
    if isinstance(wanted, int):
        wanted = [names[at] for at in seeds.numpy_rng(seed, "unseen").permutation(len(names))[:wanted]]
    for name in names if wanted == "all" else wanted:
        if name not in names:
            raise ValueError(
                f"evaluation.unseen.clients: there is no client {name!r}{plugins.nearest(name, names)}; clients: {', '.join(names)}"
            )
        if (most := max(settings.rows)) > rows[name]:
            raise ValueError(f"evaluation.unseen.rows: client {name!r} has {rows[name]} training rows, {most} are asked for; lower it")
    if wanted == "all":
        return []
    if wanted and len(set(wanted)) >= len(names):
        raise ValueError(f"evaluation.unseen.clients: of {len(names)} clients nobody would be left to federate; lower it")
    if wanted and method.shared_grafts and 0 in settings.rows:
        raise ValueError("evaluation.unseen.rows: 0: with a shared graft a client has no model before it has chosen experts; leave 0 out")
    return [name for name in names if name in wanted]


def evaluate_unseen(method: Method, client: Client, package: Bundle, settings: EvaluationSettings) -> Bundle:
    """Adapt to the first n training rows, for every wanted n from the start, and measure; nothing of it is remembered.

    The reply's `unseen` maps n to what `measure` gives for the wanted models.
    """
    found: dict[str, Any] = {}
    counts = settings.unseen.rows
    for at, count in enumerate(counts):
        report = _part_of(client.report, at, len(counts), f"with {count} rows")
        newcomer = replace(client, data=replace(client.data, train=client.data.train[:count]), memory=Bundle(), report=report)
        if count:
            _adapt(method, newcomer, package, settings.unseen.rounds_of(count, client.training.steps * client.training.batch_size))
        models = wanted_models(method.answer(method, newcomer, package), settings)
        found[str(count)], _ = measure(newcomer, models, evaluation_rows(newcomer, settings), settings)
    return Bundle(facts={"unseen": found})


def _adapt(method: Method, newcomer: Client, package: Bundle, rounds: int) -> None:
    """Train so many rounds, each from the shared leaves that the last one left.

    Leaves that a method draws anew in every round (FLoRA's pairs) are those of the last round alone.
    """
    shown, first = newcomer.data, package.facts["round"]
    assert isinstance(first, int)
    newcomer.data = shown.sealed()
    whole = newcomer.report
    for number in range(first, first + rounds):
        newcomer.report = _part_of(whole, number - first, rounds)
        facts = {**package.facts, "round": number, "lr": newcomer.training.lr}
        method.train(method, newcomer, Bundle(trees=package.trees, facts=facts))
        trained = newcomer.memory.tree("trained")
        shared = {key: trained.get(key, leaf) for key, leaf in package.tree("shared").items()}
        package = Bundle(trees={**package.trees, "shared": shared}, facts=facts)
    newcomer.data, newcomer.report = shown, unheard


def _part_of(whole: Report, at: int, of: int, title: str = "") -> Report:
    """Tells `whole` of one of so many equal parts of the work."""

    def report(done: int, total: int, loss: float | None = None, note: str = "") -> None:
        whole(round(STEPS * (at + done / max(total, 1))), STEPS * of, loss, title or note)

    return report
