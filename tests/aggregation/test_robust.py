"""Robust merges against brute force in plain numbers, and against Flower's own where it is installed."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fedgraft.aggregation.merges import Merge, Update, by_examples
from fedgraft.aggregation.robust import MergeSettings
from fedgraft.tree import equal
from tests.strategies import ADDRESSES, given

KEY, OTHER = ADDRESSES[0], ADDRESSES[1]
NUMBERS = st.lists(st.tuples(*[st.integers(-1000, 1000)] * 3), min_size=5, max_size=9)
RULES = ("median", "trimmed_mean", "krum", "multi_krum", "norm_bounded")


def merge(rule: str, **options: Any) -> Merge:
    """The rule as a recipe sets it."""
    return TypeAdapter(MergeSettings).validate_python({"rule": rule, **options}).merge(by_examples)


def updates(vectors):
    """Two leaves per client: two numbers and one."""
    return [
        Update(client=f"c{number}", delta={KEY: torch.tensor(v[:2]).double(), OTHER: torch.tensor(v[2:]).double()}, examples=number + 1)
        for number, v in enumerate(vectors)
    ]


def run(rule, vectors, **options):
    """The merged three numbers."""
    found = merge(rule, **options).run(iter(updates(vectors)))
    return [*found[KEY].tolist(), *found[OTHER].tolist()]


@given(NUMBERS)
def test_median(vectors):
    assert run("median", vectors) == [statistics.median(column) for column in zip(*vectors, strict=True)]


@given(NUMBERS, st.sampled_from([0.2, 0.25, 0.4]))
def test_trimmed_mean(vectors, trim):
    """Of five to nine clients."""
    cut = math.floor(trim * len(vectors))
    kept = [sorted(column)[cut : len(column) - cut] for column in zip(*vectors, strict=True)]
    assert run("trimmed_mean", vectors, trim=trim) == pytest.approx([statistics.fmean(values) for values in kept])


def krum_scores(vectors, faulty):
    """The sum of the n - f - 2 smallest squared distances to others, from the definition."""
    scores = []
    for index, vector in enumerate(vectors):
        others = [other for place, other in enumerate(vectors) if place != index]
        distances = sorted(sum((a - b) ** 2 for a, b in zip(vector, other, strict=True)) for other in others)
        scores.append(sum(distances[: len(vectors) - faulty - 2]))
    return scores


def krum_order(vectors, faulty):
    """Indices, the smallest score first."""
    return sorted(range(len(vectors)), key=krum_scores(vectors, faulty).__getitem__)


@given(NUMBERS, st.integers(0, 1))
def test_krum_and_multi_krum(vectors, faulty):
    order = krum_order(vectors, faulty)
    assert run("krum", vectors, faulty=faulty) == list(vectors[order[0]])
    for keep in (1, 2, None):
        kept = [vectors[index] for index in order[: keep or len(vectors) - faulty - 2]]
        expected = [statistics.fmean(column) for column in zip(*kept, strict=True)]
        assert run("multi_krum", vectors, faulty=faulty, keep=keep) == pytest.approx(expected)


@given(NUMBERS, st.floats(0.1, 1000))
def test_norm_bounding(vectors, bound):
    bounded = [[value * min(1, bound / (math.hypot(*vector) or bound)) for value in vector] for vector in vectors]
    expected = [statistics.fmean(column) for column in zip(*bounded, strict=True)]
    assert run("norm_bounded", vectors, bound=bound) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_one_liar_moves_nothing_far(rule):
    """Six honest clients near 1 and one at 10^6: the mean would be near 10^5."""
    vectors = [(1.0, 1.1, 0.9), (1.1, 0.9, 1.0), (0.9, 1.0, 1.1), (1.0, 1.0, 1.0), (1.1, 1.1, 1.1), (0.9, 0.9, 0.9), (1e6, 1e6, 1e6)]
    for order in itertools.islice(itertools.permutations(vectors), 0, 5040, 997):
        found = run(rule, order, **({"bound": 2.0} if rule == "norm_bounded" else {}))
        assert all(0.8 < value < 1.3 for value in found)


@pytest.mark.parametrize("rule", RULES)
def test_equal_updates_are_that_update(rule):
    alike = updates([(1, 2, 2)] * 7)
    assert equal(merge(rule, **({"bound": 3.0} if rule == "norm_bounded" else {})).run(alike), alike[0].delta)


@pytest.mark.parametrize(
    ("rule", "options", "least"),
    [
        ("trimmed_mean", {"trim": 0.25}, 4),
        ("trimmed_mean", {"trim": 0.1}, 10),
        ("krum", {"faulty": 1}, 5),
        ("krum", {"faulty": 0}, 3),
        ("multi_krum", {"faulty": 1}, 5),
        ("multi_krum", {"faulty": 1, "keep": 4}, 7),
    ],
)
def test_with_too_few_replies_the_state_stays(rule, options, least):
    rule = merge(rule, **options)
    assert rule.least == least
    assert rule.run(updates([(1, 2, 3)] * (least - 1))) == {}
    assert rule.run(updates([(1, 2, 3)] * least)).keys() == {KEY, OTHER}


def test_coordinate_rules_work_on_the_holders_of_each_leaf():
    vectors = updates([(1, 2, 3), (5, 6, 7), (9, 10, 11)])
    vectors[1].delta.pop(OTHER)
    found = merge("median").run(vectors)
    assert found[KEY].tolist() == [5, 6]
    assert found[OTHER].tolist() == [7]


@pytest.mark.parametrize("rule", ["krum", "multi_krum"])
def test_krum_refuses_updates_of_different_leaves(rule):
    vectors = updates([(1, 2, 3)] * 5)
    vectors[2].delta.pop(OTHER)
    with pytest.raises(ValueError, match=f"leaf '{OTHER}': only one of clients 'c0' and 'c2' holds it"):
        merge(rule).run(vectors)


@pytest.mark.parametrize("rule", RULES)
def test_a_shape_mismatch_names_leaf_and_both_clients(rule):
    vectors = updates([(1, 2, 3)] * 5)
    vectors[3].delta[KEY] = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"leaf '{KEY}': client 'c0' sent shape \(2,\), client 'c3' \(3,\)"):
        merge(rule).run(vectors)


def test_the_mean_is_the_methods_own():
    assert merge("mean") is by_examples


def test_what_they_need():
    assert not any(merge(rule).linear for rule in RULES)
    assert [merge(rule).needs_each_reply for rule in RULES] == [True, True, True, True, False]


@pytest.mark.parametrize(
    "wrong",
    [
        {"rule": "medain"},
        {"rule": "median", "trim": 0.2},
        {"rule": "trimmed_mean", "trim": 0.5},
        {"rule": "krum", "faulty": -1},
        {"rule": "norm_bounded", "bound": 0},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValidationError):
        merge(**wrong)


@given(NUMBERS)
def test_flowers_own_functions_give_the_same(vectors):
    """Median, trimmed mean, Krum and, with equal weights, multi-Krum of `flwr.server.strategy.aggregate`."""
    flower = pytest.importorskip("flwr.server.strategy.aggregate", reason="flwr is not installed; the brute-force twins above stand for it")
    if len(set(krum_scores(vectors, 1))) < len(vectors):
        return  # ties are broken differently
    results = [([update.delta[KEY].numpy(), update.delta[OTHER].numpy()], 1) for update in updates(vectors)]

    def flat(arrays):
        return [float(value) for array in arrays for value in array]

    assert run("median", vectors) == pytest.approx(flat(flower.aggregate_median(results)))
    assert run("trimmed_mean", vectors, trim=0.25) == pytest.approx(flat(flower.aggregate_trimmed_avg(results, 0.25)))
    assert run("krum", vectors) == pytest.approx(flat(flower.aggregate_krum(results, 1, 0)))
    assert run("multi_krum", vectors, keep=2) == pytest.approx(flat(flower.aggregate_krum(results, 1, 2)))
