"""Intervals: how often they cover what is known, and SciPy's as a twin."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fedgraft.intervals import FEWEST, bootstrap, of_mean

TRIALS = 400


def coverage(draw, truth):
    """Share of the trials whose interval holds the truth."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(TRIALS):
        low, high = bootstrap(*draw(rng), rng, 400)
        hits += low <= truth <= high
    return hits / TRIALS


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda rng: (rng.normal(3.0, 2.0, 40), None), 3.0),
        (lambda rng: (rng.exponential(2.0, 60), None), 2.0),
        (lambda rng: ((tokens := rng.integers(1, 40, 60)) * rng.normal(3.0, 0.5, 60), tokens), 3.0),  # nats over tokens
    ],
    ids=["normal", "skewed", "ratio"],
)
def test_an_interval_of_95_percent_covers_the_truth_about_that_often(draw, truth):
    """Binomial: 400 trials at 0.95 have a deviation of 0.011; below the nominal rate BCa of 40 to 60 units loses up to 0.03."""
    assert 0.95 - 0.03 - 2.5 * 0.011 < coverage(draw, truth) <= 0.95 + 2.5 * 0.011


def test_it_is_scipys_interval_up_to_the_draws():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 60, 50)
    nats = tokens * rng.gamma(2.0, 1.5, 50)

    def ratio(above, below, axis):
        return above.sum(axis) / below.sum(axis)

    for method, arguments, statistic in (("ratio", (nats, tokens), ratio), ("mean", (nats,), np.mean)):
        twin = stats.bootstrap(arguments, statistic, paired=True, vectorized=True, n_resamples=20_000, method="BCa", random_state=rng)
        found = bootstrap(nats, tokens if method == "ratio" else None, rng, 20_000)
        width = twin.confidence_interval.high - twin.confidence_interval.low
        assert found == pytest.approx(tuple(twin.confidence_interval), abs=0.03 * width), method


def test_the_same_stream_gives_the_same_interval_and_chunks_do_not_matter(monkeypatch):
    values = np.arange(20.0)
    whole = bootstrap(values, None, np.random.default_rng(1), 200)
    monkeypatch.setattr("fedgraft.intervals.CHUNK", 60)
    assert bootstrap(values, None, np.random.default_rng(1), 200) == whole


def test_too_few_units_have_none_and_equal_ones_a_point():
    rng = np.random.default_rng(0)
    assert bootstrap(np.arange(FEWEST - 1), None, rng, 100) is None
    assert bootstrap(np.arange(FEWEST), None, rng, 100) is not None
    assert bootstrap(np.arange(50), None, rng, 0) is None
    assert bootstrap([1.0] * 6 + [9.0], [1, 1, 1, 1, 0, 0, 0], rng, 100) is None  # a unit of no token is none
    assert bootstrap([0.1] * 9, None, rng, 100) == (pytest.approx(0.1), pytest.approx(0.1))


def test_the_interval_of_a_mean_of_clients_is_that_of_their_rows_drawn_client_by_client():
    """Stratified resampling, for which the rows of all clients are needed, agrees with what their intervals alone give."""
    rng = np.random.default_rng(3)
    clients = [rng.normal(mean, 1 + mean / 4, 200) for mean in (1.0, 2.0, 4.0)]
    found = of_mean([rows.mean() for rows in clients], [bootstrap(rows, None, rng, 4000) for rows in clients])
    means = np.mean([rows[rng.integers(0, 200, (4000, 200))].mean(1) for rows in clients], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    assert found == pytest.approx((low, high), abs=0.04 * (high - low))
    assert of_mean([1.0, 2.0], [(0.5, 1.5), None]) is None
    assert of_mean([], []) is None
