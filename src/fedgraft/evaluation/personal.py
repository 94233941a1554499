"""How well a client's models do on its own held-out rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedgraft import files, seeds
from fedgraft.bundle import Bundle
from fedgraft.data.example import Example
from fedgraft.evaluation.answers import RowScores, answer_scores, choice_scores
from fedgraft.evaluation.experts import expert_figures
from fedgraft.evaluation.knowledge import general_loss, task_figures
from fedgraft.evaluation.response import RowSums, predicting, response_sums
from fedgraft.evaluation.settings import EvaluationSettings
from fedgraft.intervals import bootstrap
from fedgraft.methods.method import Method, Prediction
from fedgraft.training.client import Client

Line: TypeAlias = dict[str, Any]
"""One model on one row: `row` (its id), `model`, `tokens`, `nats` and `right` of the response, and the scores of its answer."""
Keep: TypeAlias = Callable[[str, list[Line]], None]
"""Keeps the lines of a client where the client is: they never travel."""

GAINS = {"gain": ("", "base"), "gain_over_shared": ("personal", "shared")}
"""Figure -> (the model that has it; empty: every one, the model whose loss is the reference)."""
MOST_LINES = 40_000
"""Lines of a client that are kept, about 5 MB: 10,000 rows of four models."""


def kept_in(folder: Path) -> Keep:
    """Into `<folder>/<client>.jsonl`, a line per model and row, the first `MOST_LINES`."""

    def keep(client: str, lines: list[Line]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines[:MOST_LINES])
        files.write_text(folder / f"{client}.jsonl", text)

    return keep


def nowhere(client: str, lines: list[Line]) -> None:
    """Rows are not kept."""


def evaluate_client(method: Method, client: Client, package: Bundle, settings: EvaluationSettings, keep: Keep = nowhere) -> Bundle:
    """Measure the wanted models of one client; the reply holds figures only, what its rows gave goes to `keep`."""
    models = method.answer(method, client, package)
    rows = evaluation_rows(client, settings)
    results, lines = measure(client, wanted_models(models, settings), rows, settings)
    keep(client.name, lines)
    experts = {"expert_figures": expert_figures(client, models["personal"], rows)} if settings.experts else {}
    return Bundle(facts={"models": results, **experts})


def wanted_models(models: Mapping[str, Prediction], settings: EvaluationSettings) -> dict[str, Prediction]:
    """Those of a client's models that are to be measured."""
    wanted: tuple[str, ...] = settings.models
    return {name: model for name, model in models.items() if name in wanted}


def evaluation_rows(client: Client, settings: EvaluationSettings) -> list[Example]:
    """The client's rows of the chosen split; no others are looked at."""
    rows: list[Example] = getattr(client.data, settings.split)[: settings.rows]
    return rows


def measure(
    client: Client, models: Mapping[str, Prediction], rows: Sequence[Example], settings: EvaluationSettings
) -> tuple[dict[str, dict[str, Any]], list[Line]]:
    """Model -> figure -> value, with bootstrap intervals over the rows under `interval`; and what every row gave.

    Figures are those of `response_sums`, of `answer_scores` and `choice_scores` where measured, `general_loss`, and by how much the loss is
    below another one's on the same rows: `gain` below the base's, of a personal model also `gain_over_shared`.
    """
    results: dict[str, dict[str, Any]] = {}
    lines: list[Line] = []
    below: dict[str, RowSums] = {}
    for done, (name, model) in enumerate(models.items()):
        client.report(done, len(models), note=f"model {name}")
        figures, sums = response_sums(client, model, rows, settings.batch_size)
        scores = _scores(client, name, model, rows, settings)
        figures |= {figure: float(np.mean(known)) for figure, values in scores.items() if (known := _known(values))}
        gains = {figure: below[other] for figure, (own, other) in GAINS.items() if other in below and name != other and own in {"", name}}
        figures |= {figure: other.loss - sums.loss for figure, other in gains.items()}
        below[name] = sums
        in_use = partial(predicting, client, replace(model, tree=client.model.placed(model.tree)))
        if settings.knowledge_tokens and name in settings.knowledge_models:
            figures["general_loss"] = general_loss(client.model.base, settings.knowledge_tokens, client.training.precision, in_use)
        if name in settings.task_models:
            figures |= task_figures(client.model.base, settings, client.training.precision, in_use, untouched=not model.tree)
        results[name] = {**figures, "interval": _intervals(client, settings, sums, scores, gains)}
        lines += _lines(name, rows, sums, scores)
    return results, lines


def _scores(client: Client, name: str, model: Prediction, rows: Sequence[Example], settings: EvaluationSettings) -> RowScores:
    scores = choice_scores(client, model, rows, settings.batch_size)
    if settings.generate and name in settings.generate_models:
        scores |= answer_scores(client, model, rows[: settings.generate_rows], settings)
    return scores


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _intervals(
    client: Client, settings: EvaluationSettings, sums: RowSums, scores: RowScores, gains: Mapping[str, RowSums]
) -> dict[str, tuple[float, float]]:
    """Figure -> its interval, for those that have enough rows; a figure draws the same rows for all models of a client."""
    ratios: dict[str, tuple[NDArray[np.float64] | list[float], NDArray[np.float64] | None]] = {
        "loss": (sums.nats, sums.tokens),
        "token_accuracy": (sums.right, sums.tokens),
        **{figure: (other.nats - sums.nats, sums.tokens) for figure, other in gains.items()},
        **{figure: (_known(values), None) for figure, values in scores.items()},
    }
    found = {}
    for figure, (above, below) in ratios.items():
        rng = seeds.numpy_rng(client.seed, "bootstrap", client.name, figure)
        interval = bootstrap(above, below, rng, settings.resamples)
        if interval is not None:
            found[figure] = interval
    return found


def _lines(name: str, rows: Sequence[Example], sums: RowSums, scores: RowScores) -> list[Line]:
    lines = []
    for at, row in enumerate(rows):
        judged = {figure: values[at] for figure, values in scores.items() if at < len(values) and values[at] is not None}
        tokens = {"tokens": int(sums.tokens[at]), "nats": float(sums.nats[at]), "right": int(sums.right[at])}
        lines.append({"row": row.id, "model": name, **tokens, **judged})
    return lines
