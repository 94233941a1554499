"""Factors of changes against the singular values, their bytes, and replies that are none."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st

from fedgraft.aggregation.replies import Due, as_packed, usable
from fedgraft.aggregation.server import Reply
from fedgraft.bundle import Bundle
from fedgraft.recipe import load_recipe
from fedgraft.transforms.compression import restored, summary_lines
from fedgraft.transforms.low_rank import LowRank
from tests.strategies import given
from tests.transforms.test_compression import KEY, Memory, sent


def of_rank(rank, seed, shape=(7, 12), scale=1e-3):
    """A matrix of that rank, float64."""
    rng = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, generator=rng, dtype=torch.float64) for size in ((shape[0], rank), (rank, shape[1])))
    return left @ right * scale


def decoded(settings, change):
    return settings.decode(settings.code(change), tuple(change.shape))


def rounding(change, rank):
    """Most that the factors' rounding can add: 2^-24 |L| |R| for each factor, whose norms are roots of the sum of the values sent."""
    return 2.0**-23 * float(torch.linalg.svdvals(change)[:rank].sum()) * 1.01


@given(seed=st.integers(0, 2**32), true=st.integers(0, 4), rank=st.integers(1, 4))
def test_the_error_is_the_root_of_the_squared_singular_values_that_were_left_out(seed, true, rank):
    """Eckart and Young, from the singular values by themselves; so a change of no higher rank arrives whole, to the rounding of factors."""
    change = of_rank(true, seed) if true else torch.zeros(7, 12).double()
    tail = torch.linalg.svdvals(change)[rank:].square().sum().sqrt()
    error = (decoded(LowRank(rank=rank), change) - change).norm()
    assert abs(float(error - tail)) <= rounding(change, rank)
    if rank >= true:
        assert error <= 1e-6 * change.norm()


@given(seed=st.integers(0, 2**32), rank=st.integers(1, 4))
def test_no_other_product_of_that_rank_is_nearer(seed, rank):
    """Brute force: least squares for one factor given the other, from random ones and from those found."""
    change, settings = of_rank(7, seed), LowRank(rank=rank)
    error, parts = (decoded(settings, change) - change).norm(), settings.code(change)
    for first in (parts["right"].double(), torch.randn(rank, 12, generator=torch.Generator().manual_seed(seed)).double()):
        right = first
        for _ in range(4):
            left = change @ torch.linalg.pinv(right)
            right = torch.linalg.pinv(left) @ change
        assert (left @ right - change).norm() >= error - rounding(change, rank)


@pytest.mark.parametrize(
    ("shape", "rank", "cost"),
    [
        ((8, 64), 2, 4 * 2 * 72),
        ((64, 8), 1, 4 * 72),
        ((8, 64), 7, 4 * 7 * 72),
        ((8, 64), 8, 4 * 512),  # 8 x 72 is more than 8 x 64
        ((4, 4), 2, 4 * 16),  # 2 x 8 is no less than 16
        ((3, 6), 2, 4 * 18),
        ((12,), 1, 48),
        ((2, 3, 40), 1, 4 * 240),
        ((), 1, 4),
        ((0, 3), 1, 0),
    ],
)
def test_a_leaf_costs_its_factors_or_itself_whichever_is_less(shape, rank, cost):
    """By hand; what the parts hold is what is said."""
    settings, change = LowRank(rank=rank), torch.randn(shape, dtype=torch.float64)
    parts = settings.code(change)
    assert settings.bytes_of(shape) == cost == sum(part.numel() * part.itemsize for part in parts.values())
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == {
        name: (settings.parts[name], of) for name, of in settings.shapes(shape).items()
    }
    assert ("" in parts) == (cost == 4 * math.prod(shape))
    if "" in parts:
        torch.testing.assert_close(decoded(settings, change), change, rtol=1e-7, atol=0)


def test_the_screen_says_where_nothing_is_saved():
    shapes = {"a": (8, 64), "b": (12,)}
    assert summary_lines(LowRank(rank=2), shapes) == [("", "sent up as low_rank: 624 B")]
    assert summary_lines(LowRank(rank=8), shapes) == [("", "sent up as low_rank: 2.1 kB, which saves nothing")]


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["factor", "change"])
def test_numbers_that_are_not_finite_lose_the_reply_by_name(number, where):
    """In the factors of a hostile client, and in the change of one whose training went astray; the run goes on."""
    start, trained, settings, lost = torch.zeros(6, 11), torch.ones(6, 11), LowRank(), []
    if where == "change":
        trained[2, 3] = number
    reply = sent(settings, start, trained, Memory())
    if where == "factor":
        reply.tree("shared.left")[KEY][1, 0] = number
    packages = {"ada": Bundle(trees={"shared": {KEY: start}})}
    hear = lambda client, reason: lost.append(reason)  # noqa: E731
    whole = restored(settings, iter([Reply(client="ada", bundle=Bundle.decode(reply.encode()))]), packages, hear)
    assert not list(usable(whole, packages, Due(leaves=as_packed), {}, hear))
    assert len(lost) == 1
    assert f"client 'ada' can't be used: leaf {KEY!r} of 'shared' holds numbers that are not finite" in lost[0]


@pytest.mark.parametrize("rank", [0, -1, 1.5])
def test_a_rank_is_a_positive_whole_number(rank):
    with pytest.raises(ValueError, match=r"compression\..*rank"):
        load_recipe({"method": {"name": "fedavg"}, "compression": {"name": "low_rank", "rank": rank}})
