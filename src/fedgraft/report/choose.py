"""The best setting of each method by validation rows, and by nothing else: runs that were evaluated on test rows are refused.

A candidate is what runs that differ only in their seed have in common; its value is the mean over seeds of the mean over clients of a
figure of the personal models. No run chooses a round: what is evaluated is always the state after the last one.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedgraft.plugins import nearest
from fedgraft.report.groups import Group, grouped
from fedgraft.report.record import Record
from fedgraft.report.shaping import flat
from fedgraft.report.table import described, possible

SPLIT = "validation"
APART = ("seed", "evaluation.")
"""Beginnings of the keys that are no setting of a method."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is best for one method."""

    method: str
    settings: dict[str, Any]
    """Dotted recipe key -> value, for the keys in which the candidates of the method differ."""
    value: float
    runner_up: float | None
    """Value of the second best; None where nothing else was tried."""
    candidates: int
    seeds: list[int]
    """Seeds that all candidates have, over which they are compared."""
    edges: list[str]
    """Keys whose best value is the lowest or highest of those tried, so that a better one may lie beyond."""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def choose(records: Sequence[Record], figure: str) -> list[Choice]:
    """One choice per method, in the order of the runs; of equal candidates the first.

    Raises:
        ValueError: an unknown figure; a run evaluated on other than validation rows, or not at all; candidates of one method that were
            evaluated on different rows or have no seed in common.
    """
    if figure not in (known := possible(records)):
        raise ValueError(f"--choose {figure}: no such figure{nearest(figure, known)}; there are: {', '.join(known)}")
    check_validation(records)
    methods: dict[str, list[Group]] = {}
    for group in grouped(records):
        methods.setdefault(group.runs[0].method, []).append(group)
    return [_best(method, groups, figure) for method, groups in methods.items()]


def check_validation(records: Sequence[Record]) -> None:
    """Let only runs pass from whose figures something may be chosen.

    Raises:
        ValueError: a run was evaluated on other than validation rows, or not at all; names it.
    """
    for record in records:
        if record.split != SPLIT:
            rows = f"was evaluated on {record.split} rows" if record.split else "does not say which rows it was evaluated on"
            raise ValueError(
                f"{record.folder}: {rows}, and nothing may be chosen by other than {SPLIT} rows; "
                f"run the candidates with --set evaluation.split={SPLIT}"
            )


def _best(method: str, groups: Sequence[Group], figure: str) -> Choice:
    _check_comparable(method, groups)
    by_seed = [group.by_seed("personal", figure) for group in groups]
    seeds = sorted(set.intersection(*(set(found) for found in by_seed)))
    if not seeds:
        raise ValueError(f"method {method!r}: its runs have no seed in common in which {figure!r} of their personal models was measured")
    values = [statistics.fmean(statistics.fmean(found[seed].values()) for seed in seeds) for found in by_seed]
    sign = -1 if described(figure)[1] else 1
    order = sorted(range(len(groups)), key=lambda at: sign * values[at])
    settings = _settings(groups)
    return Choice(
        method=method,
        settings=settings[order[0]],
        value=values[order[0]],
        runner_up=values[order[1]] if len(order) > 1 else None,
        candidates=len(groups),
        seeds=seeds,
        edges=_edges(settings, order[0]),
    )


def _check_comparable(method: str, groups: Sequence[Group]) -> None:
    rows = {
        json.dumps([run.recipe.get("data"), run.recipe.get("evaluation", {}).get("rows")], sort_keys=True)
        for group in groups
        for run in group.runs
    }
    if len(rows) > 1:
        raise ValueError(
            f"method {method!r}: its runs were evaluated on different rows (section data, or evaluation.rows); choose among equals"
        )


def _settings(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What tells the candidates apart, for each of them."""
    recipes = [dict(flat(group.runs[0].recipe)) for group in groups]
    keys = sorted({key for recipe in recipes for key in recipe if not key.startswith(APART)})
    telling = [key for key in keys if len({json.dumps(recipe.get(key), default=str) for recipe in recipes}) > 1]
    return [{key: recipe[key] for key in telling if key in recipe} for recipe in recipes]


def _edges(settings: Sequence[dict[str, Any]], best: int) -> list[str]:
    found = []
    for key, value in settings[best].items():
        tried = [other[key] for other in settings if key in other]
        numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in tried)
        if numbers and len(set(tried)) > 1 and value in (min(tried), max(tried)):
            found.append(key)
    return found
