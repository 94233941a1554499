"""Random streams depend on their names alone."""

from __future__ import annotations

import itertools

import torch
from hypothesis import strategies as st

from fedgraft import seeds
from tests.strategies import given

PARTS = st.lists(st.integers(0, 99) | st.text("abc-", max_size=3), max_size=3)


@given(st.integers(0, 2**40), st.text("abc", min_size=1), PARTS)
def test_derive_is_a_function_into_63_bits(seed, purpose, parts):
    value = seeds.derive(seed, purpose, *parts)
    assert 0 <= value < 2**63
    assert value == seeds.derive(seed, purpose, *parts)


def test_every_part_of_a_name_counts():
    names = [
        (0, "fit", 1, "a"),
        (1, "fit", 1, "a"),
        (0, "batches", 1, "a"),
        (0, "fit", 2, "a"),
        (0, "fit", 1, "b"),
        (0, "fit", 1),
        (0, "fit"),
    ]
    names += [(0, "fit", "1a"), (0, "fit", "a", 1), (0, "fit1", "a"), (0, "fit", 11, "a")]
    assert len({seeds.derive(*name) for name in names}) == len(names)


def test_streams_are_reproducible_and_apart():
    for make in (seeds.numpy_rng, seeds.torch_rng):
        draws = [make(0, "x", part) for part in ("a", "a", "b")]
        first, same, other = (rng.random() if make is seeds.numpy_rng else torch.rand((), generator=rng).item() for rng in draws)
        assert first == same != other


def test_torch_default_is_seeded_inside_and_put_back():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with seeds.torch_default(9):
        inside = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with seeds.torch_default(9):
        assert torch.equal(torch.rand(3), inside)
    assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(9)))


def test_torch_default_is_put_back_after_an_error():
    before = torch.get_rng_state()
    try:
        with seeds.torch_default(1):
            torch.rand(1)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_leaf_streams_of_neighbouring_seeds_are_unrelated():
    """Correlation of 64 x 1,000 draws stays within 5 standard errors of 0."""
    rows = torch.stack([torch.rand(1000, generator=seeds.torch_rng(seed, "leaf", "x")) for seed in range(8)])
    correlation = torch.corrcoef(rows)
    assert all(abs(correlation[i, j]) < 5 / 1000**0.5 for i, j in itertools.combinations(range(8), 2))
