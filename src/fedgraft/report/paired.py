"""Is one group of runs better than another, beyond what its seeds do? Paired over what both have: the same seed has the same data.

Paired t test: over seeds, on the mean over clients; given the data, seeds are independent of each other. Wilcoxon's signed-rank
test: over seeds x clients, more pairs and no normality, but the clients of one run share its aggregated leaves, so its p is on
the hopeful side. Both are two-sided. Against several comparisons with one reference p is corrected after Holm (1979).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

FEWEST_SEEDS = 3
FEWEST_PAIRS = 6  # Wilcoxon's exact two-sided p cannot fall below 2 / 2^n, 0.03 for 6
BySeed = Mapping[int, Mapping[str, float]]
"""Seed -> client -> value."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One test: p, or why there is none."""

    p: float | None
    pairs: int
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A group against the reference, over the seeds and clients that both have."""

    difference: float | None
    """Mean over seeds of (its mean over clients - the reference's); None without a common seed."""
    seeds: int
    t: Verdict
    """Over seeds."""
    wilcoxon: Verdict
    """Over seeds x clients."""


def compare(own: BySeed, reference: BySeed) -> Comparison:
    """Compare, uncorrected."""
    differences = {
        seed: [own[seed][client] - reference[seed][client] for client in sorted(own[seed].keys() & reference[seed].keys())]
        for seed in sorted(own.keys() & reference.keys())
    }
    means = [statistics.fmean(values) for values in differences.values() if values]
    pairs = [value for values in differences.values() for value in values]
    return Comparison(
        difference=statistics.fmean(means) if means else None,
        seeds=len(means),
        t=_t(means),
        wilcoxon=_wilcoxon(pairs, len(means)),
    )


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same with p after Holm, for each of the two tests over all comparisons that have one."""
    t = holm([one.t.p for one in comparisons])
    wilcoxon = holm([one.wilcoxon.p for one in comparisons])
    return [
        replace(one, t=replace(one.t, p=first), wilcoxon=replace(one.wilcoxon, p=second))
        for one, first, second in zip(comparisons, t, wilcoxon, strict=True)
    ]


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction: the i-th smallest of m times m - i + 1, never below a smaller one's, at most 1."""
    order = sorted((p, at) for at, p in enumerate(values) if p is not None)
    result: list[float | None] = [None] * len(values)
    so_far = 0.0
    for rank, (p, at) in enumerate(order):
        so_far = max(so_far, min(1.0, p * (len(order) - rank)))
        result[at] = so_far
    return result


def _t(differences: Sequence[float]) -> Verdict:
    if len(differences) < FEWEST_SEEDS:
        return Verdict(p=None, pairs=len(differences), why="too few seeds")
    if _all_the_same(differences):
        return Verdict(p=None, pairs=len(differences), why="same in every seed")
    from scipy import stats

    return Verdict(p=float(stats.ttest_1samp(differences, 0.0).pvalue), pairs=len(differences))


def _wilcoxon(differences: Sequence[float], seeds: int) -> Verdict:
    if seeds < FEWEST_SEEDS:
        return Verdict(p=None, pairs=len(differences), why="too few seeds")
    if sum(value != 0 for value in differences) < FEWEST_PAIRS:
        return Verdict(p=None, pairs=len(differences), why="too few differ")
    from scipy import stats

    return Verdict(p=float(stats.wilcoxon(differences).pvalue), pairs=len(differences))


def _all_the_same(values: Sequence[float]) -> bool:
    """Up to rounding, so that a test would divide by nothing."""
    return math.isclose(min(values), max(values), rel_tol=1e-12, abs_tol=1e-15)
