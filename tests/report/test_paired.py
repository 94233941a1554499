"""The paired tests against hand calculation and scipy, and where there is nothing to test."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from fedgraft.report.paired import Comparison, Verdict, compare, corrected, holm


def by_seed(matrix) -> dict[int, dict[str, float]]:
    """[seeds, clients] as seed -> client -> value."""
    return {seed: {f"c{at}": float(value) for at, value in enumerate(row)} for seed, row in enumerate(matrix)}


def test_t_is_over_seeds_on_means_by_hand():
    """Mean differences 1, 2, 3: t = 2 / (1 / sqrt(3)) = 2 sqrt(3) with 2 degrees of freedom, where p = 1 - t / sqrt(t^2 + 2)."""
    found = compare(by_seed([[2, 2], [1, 5], [4, 4]]), by_seed([[0, 2], [1, 1], [0, 2]]))
    t = 2 * math.sqrt(3)
    assert found.difference == pytest.approx(2)
    assert found.seeds == found.t.pairs == 3
    assert found.t.p == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-12)


def test_wilcoxon_is_over_seeds_and_clients_by_hand():
    """Six differences of one sign, all of different size: 2 of the 2^6 sign patterns are as far out."""
    found = compare(by_seed([[1, 2], [3, 4], [5, 6]]), by_seed(np.zeros((3, 2))))
    assert found.wilcoxon == Verdict(p=2 / 2**6, pairs=6)


def test_wilcoxon_counts_sign_patterns():
    differences = [1.0, -2.0, 3.0, 4.0, -5.0, 6.5, 7.5]
    ranks = range(1, 8)
    sums = [sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign) for signs in product((0, 1), repeat=7)]
    own = sum(rank for rank, value in zip(ranks, differences, strict=True) if value > 0)
    low = min(own, 28 - own)
    expected = sum(total <= low or total >= 28 - low for total in sums) / len(sums)
    found = compare(by_seed([differences[:3], differences[3:5], differences[5:]]), by_seed(np.zeros((3, 3))))
    assert found.wilcoxon.p == pytest.approx(expected)


def test_both_equal_scipy_on_random_pairs():
    rng = np.random.default_rng(0)
    own, other = rng.normal(0.3, 1, (5, 12)), rng.normal(0, 1, (5, 12))
    found = compare(by_seed(own), by_seed(other))
    assert found.t.p == pytest.approx(stats.ttest_rel(own.mean(1), other.mean(1)).pvalue)
    assert found.wilcoxon.p == pytest.approx(stats.wilcoxon(own.ravel(), other.ravel()).pvalue)
    assert found.difference == pytest.approx(own.mean() - other.mean())


def test_only_common_seeds_and_clients_are_paired():
    own = {0: {"a": 1.0, "b": 5.0}, 1: {"a": 2.0}, 2: {"a": 9.0}}
    found = compare(own, {1: {"a": 1.5, "c": 7.0}, 2: {"a": 8.0}, 3: {"a": 1.0}})
    assert (found.difference, found.seeds, found.wilcoxon.pairs) == (0.75, 2, 2)


@pytest.mark.parametrize("seeds", [0, 1, 2])
def test_fewer_than_three_seeds_have_no_p(seeds):
    found = compare(by_seed(np.ones((seeds, 9))), by_seed(np.zeros((seeds, 9))))
    assert {found.t.why, found.wilcoxon.why} == {"too few seeds"}
    assert found.t.p is found.wilcoxon.p is None
    assert found.difference == (1 if seeds else None)


def test_equal_runs_have_no_p_and_no_warning():
    found = compare(by_seed(np.ones((4, 3))), by_seed(np.ones((4, 3))))
    assert found.t.why == "same in every seed"
    assert found.wilcoxon.why == "too few differ"
    shifted = compare(by_seed(np.full((4, 3), 1.1)), by_seed(np.ones((4, 3))))
    assert shifted.t.why == "same in every seed"
    assert shifted.wilcoxon.p is not None


def test_zeros_and_ties_are_borne():
    found = compare(by_seed([[1, 0, 1], [1, -1, 2], [2, 2, 0]]), by_seed(np.zeros((3, 3))))
    assert 0 < found.wilcoxon.p < 1
    assert found.wilcoxon.pairs == 9


def test_holm_by_hand():
    """Sorted 0.01, 0.03, 0.04 times 3, 2, 1: 0.03, 0.06, and 0.04 raised to 0.06."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_leaves_out_what_was_not_tested():
    assert holm([None, 0.02, None, 0.3]) == [None, pytest.approx(0.04), None, pytest.approx(0.3)]
    none, some = Verdict(p=None, pairs=2, why="too few seeds"), Verdict(p=0.02, pairs=3)
    first = Comparison(difference=1.0, seeds=3, t=some, wilcoxon=none)
    assert corrected([first, first])[1] == Comparison(difference=1.0, seeds=3, t=Verdict(p=0.04, pairs=3), wilcoxon=none)
