"""Runs that differ only in their seed, taken together."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedgraft.report.record import Record

SEED = re.compile(r"[-_. ]?seed[-_=]?\d+")  # as sweeps write it into a folder's name


@dataclass(frozen=True, kw_only=True)
class Group:
    """One or several runs, each with a seed of its own and otherwise the same recipe."""

    name: str
    runs: Sequence[Record]

    def by_seed(self, model: str, figure: str) -> dict[int, dict[str, float]]:
        """Seed -> client -> value, for the seeds in which it was measured."""
        found = {int(record.recipe.get("seed", 0)): record.figures(model, figure) for record in self.runs}
        return {seed: values for seed, values in sorted(found.items()) if values}

    def figures(self, model: str, figure: str) -> dict[str, float]:
        """Client -> mean over the seeds in which it was measured."""
        values: dict[str, list[float]] = {}
        for clients in self.by_seed(model, figure).values():
            for client, value in clients.items():
                values.setdefault(client, []).append(value)
        return {client: statistics.fmean(measured) for client, measured in values.items()}


def grouped(records: Sequence[Record]) -> list[Group]:
    """The groups in the order of their first runs. A run whose recipe and seed are those of an earlier one begins a group of its own."""
    found: list[tuple[str, list[Record]]] = []
    for record in records:
        key = _but_seed(record.recipe)
        place = next((runs for other, runs in found if other == key and record.recipe.get("seed") not in _seeds(runs)), None)
        if place is None:
            found.append((key, [record]))
        else:
            place.append(record)
    names = labels([runs[0] for _, runs in found], [len(runs) > 1 for _, runs in found])
    return [Group(name=name, runs=runs) for name, (_, runs) in zip(names, found, strict=True)]


def labels(records: Sequence[Record], several: Sequence[bool] = ()) -> list[str]:
    """A short name for each run: its method, with the folder's name where two runs share a method, or its path where they share both.

    `several`: which of them stand for runs of several seeds; the seed is left out of their folder's name.
    """
    many = several or [False] * len(records)
    folders = [
        SEED.sub("", record.folder.name) or record.folder.name if seeds else record.folder.name
        for record, seeds in zip(records, many, strict=True)
    ]
    forms = [
        [record.method for record in records],
        [f"{record.method} ({folder})" for record, folder in zip(records, folders, strict=True)],
        [f"{record.method} ({record.folder})" for record in records],
    ]
    return [
        next((name for name, form in zip(names, forms, strict=True) if form.count(name) == 1), names[-1])
        for names in zip(*forms, strict=True)
    ]


def _but_seed(recipe: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in recipe.items() if key != "seed"}, sort_keys=True, default=str)


def _seeds(runs: Sequence[Record]) -> set[Any]:
    return {record.recipe.get("seed") for record in runs}
