"""Curves of runs that differ in their seed alone: their mean, and from the lowest seed to the highest."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from fedgraft.report.figures import Series
from fedgraft.report.shaping import MANY, styles

Spread: TypeAlias = dict[float, tuple[float, float, float]]
"""Where on the x axis -> mean, lowest and highest over seeds."""


def over_seeds(runs: Sequence[Mapping[float, float]]) -> Spread:
    """Over the runs that have come so far and have a number there; not a number where none does."""
    found = {}
    for at in sorted({at for run in runs for at in run}):
        values = [run[at] for run in runs if math.isfinite(run.get(at, math.nan))] or [math.nan]
        found[at] = statistics.fmean(values), min(values), max(values)
    return found


def series(found: Mapping[str, Spread]) -> list[Series]:
    """A curve for each name, shaded where seeds differ."""
    look = styles(list(found))
    return [
        Series(
            label=name,
            style=look[name],
            points=[(at, mean) for at, (mean, _, _) in spread.items()],
            band=[(low, high) for _, low, high in spread.values()] if _several(spread) else (),
        )
        for name, spread in found.items()
    ]


def caption(found: Mapping[str, Spread]) -> str:
    """What the curves show."""
    several = any(_several(spread) for spread in found.values())
    return "Mean over clients, then over seeds; shaded: from the lowest seed to the highest." if several else "Mean over clients."


def told(spread: Spread, at: float, digits: int = 3) -> str:
    """A table's cell; a dash where nothing was measured."""
    if at not in spread:
        return "–"
    mean, low, high = spread[at]
    return f"{mean:.{digits}f}" if low == high or math.isnan(mean) else f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ends(values: Mapping[str, float], digits: int = 3) -> str:
    """The values in words: each, or the lowest and the highest where there are many."""
    known = {name: value for name, value in values.items() if math.isfinite(value)}
    if len(known) <= MANY:
        return "; ".join(f"{name} {value:.{digits}f}" for name, value in known.items())
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    return f"{len(known)} from {known[low]:.{digits}f} ({low}) to {known[high]:.{digits}f} ({high})"


def _several(spread: Spread) -> bool:
    return any(low < high for _, low, high in spread.values())
