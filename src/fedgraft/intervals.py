"""Intervals that say how far a figure would move with other rows, or with other clients.

`bootstrap` is the bias-corrected and accelerated interval (BCa; Efron 1987) of a ratio of sums over independent units, which covers a mean
(denominator 1), a loss per token (nats over tokens) and a difference of two of these on the same rows. `of_mean` puts intervals of
independent values together into one of their mean (MOVER; Zou and Donner 2008), without the units behind them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
FEWEST = 5
"""Units below which there is no interval: of 4 there are only 35 different resamples."""
CHUNK = 1 << 18
"""Most numbers that are drawn at once, or those of one resample; some 6 MB, so that memory does not grow with the units."""
Interval: TypeAlias = tuple[float, float]
NORMAL = NormalDist()


def bootstrap(
    numerator: ArrayLike, denominator: ArrayLike | None, rng: np.random.Generator, resamples: int, level: float = LEVEL
) -> Interval | None:
    """The BCa interval of sum(numerator) / sum(denominator), units drawn with replacement; None for fewer than `FEWEST` units.

    Args:
        numerator: [N].
        denominator: [N], none of them negative; None for the mean. Units of 0 add nothing and are left out.
        rng: what draws.
        resamples: how many; 0 for no interval.
        level: nominal coverage.
    """
    above = np.asarray(numerator, dtype=np.float64)
    below = np.ones_like(above) if denominator is None else np.asarray(denominator, dtype=np.float64)
    above, below = above[below > 0], below[below > 0]
    if len(above) < FEWEST or resamples < 1:
        return None
    value = above.sum() / below.sum()
    drawn = np.sort(_replicates(above, below, rng, resamples))
    if math.isclose(drawn[0], drawn[-1], rel_tol=1e-12, abs_tol=1e-15):
        return float(value), float(value)
    share = (np.count_nonzero(drawn < value) + np.count_nonzero(drawn <= value)) / (2 * resamples)
    bias = NORMAL.inv_cdf(min(max(share, 0.5 / resamples), 1 - 0.5 / resamples))
    acceleration = _acceleration(above, below)
    low, high = (_share(NORMAL.inv_cdf((1 + sign * level) / 2), bias, acceleration) for sign in (-1, 1))
    ends = np.quantile(drawn, [low, high])
    return float(ends[0]), float(ends[1])


def of_mean(values: Sequence[float], intervals: Sequence[Interval | None]) -> Interval | None:
    """An interval of the mean of independent values from an interval of each; None where one is missing."""
    known = [interval for interval in intervals if interval is not None]
    if not values or len(known) < len(values):
        return None
    mean = fmean(values)
    below = math.hypot(*(value - low for value, (low, _) in zip(values, known, strict=True))) / len(values)
    above = math.hypot(*(high - value for value, (_, high) in zip(values, known, strict=True))) / len(values)
    return mean - below, mean + above


def _replicates(above: NDArray[np.float64], below: NDArray[np.float64], rng: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    count = len(above)
    at_once = max(1, CHUNK // count)
    parts = []
    for start in range(0, resamples, at_once):
        chosen = rng.integers(0, count, (min(at_once, resamples - start), count))
        parts.append(above[chosen].sum(1) / below[chosen].sum(1))
    return np.concatenate(parts)


def _acceleration(above: NDArray[np.float64], below: NDArray[np.float64]) -> float:
    """From the skewness of the values without one unit each."""
    left = (above.sum() - above) / (below.sum() - below)
    apart = left.mean() - left
    spread = float((apart**2).sum()) ** 1.5
    return float((apart**3).sum()) / (6 * spread) if spread > 0 else 0.0


def _share(normal: float, bias: float, acceleration: float) -> float:
    """The share of the replicates below an end, corrected."""
    shifted = bias + normal
    return NORMAL.cdf(bias + shifted / (1 - acceleration * shifted))
