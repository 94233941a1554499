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
