"""Leaf addresses and the predicates over them."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from fedgraft import address
from tests.strategies import given

LAYERS = st.integers(0, 200)


def test_addresses_are_the_documented_ones():
    assert address.projection(3, "attention", "q") == "layers.3.attention.q"
    assert address.side_expert(3, 0, "gate") == "layers.3.side.0.expert.gate"
    assert address.expert(3, 17, "down") == "layers.3.expert.17.down"
    assert address.router(3) == "layers.3.router.weight"
    assert address.side_mix(3, 1, "weight") == "layers.3.side.1.mix.weight"


@given(LAYERS, LAYERS, st.sampled_from("qkvo"), st.sampled_from(["A", "B", "weight", "bias"]))
def test_layer_and_place_are_read_back(layer, graft, role, part):
    attention = f"{address.projection(layer, 'attention', role)}.{part}"
    expert = f"{address.side_expert(layer, graft, 'down')}.{part}"
    mix = address.side_mix(layer, graft, part)
    assert {address.layer_of(leaf) for leaf in (attention, expert, mix)} == {layer}
    assert [address.place_of(leaf) for leaf in (attention, expert, mix)] == ["attention", "side", "side"]
    assert len({attention, expert, mix}) == 3


@pytest.mark.parametrize(
    ("predicate", "expected"),
    [
        (address.within("side"), [False, True]),
        (address.within("attention", "side"), [True, True]),
        (address.within(), [False, False]),
        (address.nothing, [False, False]),
        (address.everything, [True, True]),
    ],
)
def test_predicates(predicate, expected):
    leaves = [address.projection(0, "attention", "k") + ".A", address.side_mix(0, 0, "weight")]
    assert [predicate(leaf) for leaf in leaves] == expected


@pytest.mark.parametrize("head", ["layers.3.attention.q", "layers.12.shared.up", "layers.0.linear.mlp.own.down_proj"])
def test_second_leaves_stand_beside_the_first_and_back(head):
    tree = {f"{head}.A": 1, f"{head}.B": 2}
    second = address.as_own(tree)
    assert address.as_first(second) == tree
    assert [address.place_of(key) for key in second] == ["own", "own"]
    assert {address.layer_of(key) for key in second} == {address.layer_of(head)}
    assert address.own("layers.3.attention.q.A") == "layers.3.own.attention.q.A"
    assert not any(map(address.within("own"), tree))


def test_the_share_is_a_leaf_of_the_second_ones():
    assert address.place_of(address.MIX) == "own"
    assert address.within("own")(address.MIX)


def test_residuals_are_told_from_pairs():
    head = "layers.3.attention.q"
    assert all(map(address.is_residual, [f"{head}.residual", f"{head}.residual.A", f"{head}.residual.B"]))
    assert not any(map(address.is_residual, [f"{head}.A", f"{head}.B", "layers.3.router.weight"]))
