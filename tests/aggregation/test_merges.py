"""Merges and server steps against brute force."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import strategies as st

from fedgraft.aggregation import merges
from fedgraft.aggregation.merges import Difference, Update, by_examples, uniform
from fedgraft.aggregation.server_steps import replace
from fedgraft.bundle import Bundle
from fedgraft.tree import digest, equal, subtract
from tests.strategies import ADDRESSES, given

VALUES = st.floats(-1e3, 1e3, width=32)
DELTAS = st.dictionaries(st.sampled_from(ADDRESSES), st.tuples(VALUES, VALUES), max_size=4)
CLIENTS = st.lists(st.tuples(DELTAS, st.integers(1, 1000)), max_size=5)
MERGES = {"by_examples": (by_examples, lambda examples: examples), "uniform": (uniform, lambda examples: 1)}


def updates(clients):
    return [
        Update(client=f"c{number}", delta={key: torch.tensor(pair, dtype=torch.float64) for key, pair in delta.items()}, examples=examples)
        for number, (delta, examples) in enumerate(clients)
    ]


@pytest.mark.parametrize("name", MERGES)
@given(clients=CLIENTS)
def test_mean_over_the_holders_of_each_leaf(name, clients):
    """In exact fractions: sum of weight x delta over those clients that sent the leaf, divided by their weights."""
    merge, weight = MERGES[name]
    found = merge.run(iter(updates(clients)))
    assert found.keys() == {key for delta, _ in clients for key in delta}
    for key, leaf in found.items():
        held = [(delta[key], Fraction(weight(examples))) for delta, examples in clients if key in delta]
        total = sum(share for _, share in held)
        expected = [float(sum(Fraction(pair[place]) * share for pair, share in held) / total) for place in (0, 1)]
        assert leaf.dtype == torch.float64
        assert leaf.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-11)


@pytest.mark.parametrize("name", MERGES)
@given(delta=DELTAS, examples=st.integers(1, 10**6))
def test_one_client_is_itself_bit_for_bit(name, delta, examples):
    (update,) = updates([(delta, examples)])
    found = MERGES[name][0].run([update])
    assert equal(found, update.delta)
    assert not any(found[key] is update.delta[key] for key in found)  # the reply's tensors are not summed into


@given(st.lists(st.floats(2.0**-10, 2.0**10, width=32), min_size=1, max_size=8), st.integers(1, 10**6))
def test_one_clients_leaves_become_the_state_bit_for_bit(values, examples):
    """Difference, merge, step: exact while the exponents of old and new value differ by less than 29 (53 - 24 bits)."""
    old = Bundle(trees={"shared": {ADDRESSES[0]: torch.tensor(values)}, "moments": {}}, facts={"n": 1})
    new = {ADDRESSES[0]: -torch.tensor(values).roll(1)}
    delta = by_examples.run([Update(client="a", delta=subtract(new, old.tree("shared")), examples=examples)])
    state = replace(old, delta)
    assert equal(state.tree("shared"), new)
    assert state.facts == {"n": 1}
    assert state.trees.keys() == old.trees.keys()


def test_weights_are_the_examples():
    clients = [({ADDRESSES[0]: (1.0, 0.0)}, 30), ({ADDRESSES[0]: (5.0, 8.0)}, 10)]
    assert by_examples.run(updates(clients))[ADDRESSES[0]].tolist() == [2.0, 2.0]
    assert uniform.run(updates(clients))[ADDRESSES[0]].tolist() == [3.0, 4.0]


def test_no_reply_and_an_unheld_leaf_leave_the_state():
    state = Bundle(trees={"shared": {ADDRESSES[0]: torch.tensor([0.1]), ADDRESSES[1]: torch.tensor([0.2])}})
    assert by_examples.run([]) == {}
    assert digest(replace(state, {}).tree("shared")) == digest(state.tree("shared"))
    after = replace(state, {ADDRESSES[0]: torch.tensor([1.0], dtype=torch.float64)})
    assert after.tree("shared")[ADDRESSES[0]].item() == pytest.approx(1.1)
    assert torch.equal(after.tree("shared")[ADDRESSES[1]], state.tree("shared")[ADDRESSES[1]])
    assert state.tree("shared")[ADDRESSES[0]].item() == pytest.approx(0.1)


@pytest.mark.parametrize("name", MERGES)
def test_a_shape_mismatch_names_leaf_and_both_clients(name):
    found = updates([({}, 1), ({ADDRESSES[0]: (1.0, 2.0)}, 1)])
    other = Update(client="late", delta={ADDRESSES[0]: torch.zeros(3, dtype=torch.float64)}, examples=1)
    with pytest.raises(ValueError, match=r"leaf 'layers.0.attention.q.A': client 'c1' sent shape \(2,\), client 'late' \(3,\)"):
        MERGES[name][0].run([*found, other])


def test_replies_are_folded_as_they_come():
    """Memory of one tree: an update is not asked for before the one before it has been used up."""
    alive = []

    def stream():
        for number in range(3):
            update = Update(client=str(number), delta={"a": torch.full((1,), float(number), dtype=torch.float64)}, examples=1)
            alive.append(number)
            yield update
            alive.remove(number)

    assert by_examples.run(stream())["a"].item() == 1.0
    assert alive == []


def test_a_fold_in_pieces_gives_the_bits_of_one_in_whole_leaves(monkeypatch):
    """The twin is the formula, leaf by leaf; pieces of 7 divide no leaf. Leaves of other layouts and types are folded as well."""
    monkeypatch.setattr(merges, "PIECE", 7)
    draw = torch.Generator().manual_seed(0)
    old = {key: torch.randn(5, 6, generator=draw) for key in ADDRESSES[:2]} | {ADDRESSES[2]: torch.randn((), generator=draw)}
    news = [
        {key: torch.randn(leaf.shape[::-1], generator=draw).permute(tuple(reversed(range(leaf.ndim)))) for key, leaf in old.items()}
        for _ in range(4)
    ]
    news[2] = {key: leaf.bfloat16() for key, leaf in news[2].items()}
    found = by_examples.run(Update(client=str(number), delta=Difference(new, old), examples=number + 3) for number, new in enumerate(news))
    expected, total = subtract(news[0], old), 3
    for number, new in list(enumerate(news))[1:]:
        total += number + 3
        for key, delta in subtract(new, old).items():
            expected[key].lerp_(delta, (number + 3) / total)
    assert equal(found, expected)


def test_a_difference_holds_what_the_state_holds():
    (key, *_), leaf = ADDRESSES, torch.ones(2)
    assert equal(dict(Difference({key: leaf}, {key: leaf / 4})), subtract({key: leaf}, {key: leaf / 4}))
    with pytest.raises(ValueError, match="where the state holds nothing"):
        Difference({key: leaf}, {})
