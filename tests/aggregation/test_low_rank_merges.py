"""Merges by the product, on random pairs of random ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from fedgraft.aggregation.low_rank_merges import averaged_with_residual, by_product_norm, cut, padded, refactorised, stacked, truncated_svd
from fedgraft.aggregation.merges import Update
from tests.strategies import given

HEAD = "layers.0.attention.q"


def pair(rank, seed=0, inputs=7, outputs=5):
    rng = torch.Generator().manual_seed(seed)
    sizes = {"A": (rank, inputs), "B": (outputs, rank)}
    return {f"{HEAD}.{part}": torch.randn(*size, generator=rng, dtype=torch.float64) for part, size in sizes.items()}


def updates(ranks, examples):
    return [
        Update(client=str(at), delta=pair(rank, at), examples=count) for at, (rank, count) in enumerate(zip(ranks, examples, strict=True))
    ]


def product(tree, alpha=3.0):
    return alpha / len(tree[f"{HEAD}.A"]) * tree[f"{HEAD}.B"] @ tree[f"{HEAD}.A"]


def mean(held, alpha=3.0):
    return sum(one.examples * product(one.delta, alpha) for one in held) / sum(one.examples for one in held)


RANKS = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@given(RANKS, st.integers(0, 20), max_examples=40)
def test_a_stack_is_the_mean_of_products(ranks, seed):
    held = updates(ranks, [1 + (seed + at) % 5 for at in range(len(ranks))])
    found = stacked(3.0).run(held)
    assert len(found[f"{HEAD}.residual.A"]) == sum(ranks)
    torch.testing.assert_close(found[f"{HEAD}.residual.B"] @ found[f"{HEAD}.residual.A"], mean(held))


@given(RANKS, st.integers(1, 12), max_examples=40)
def test_refactorised_is_the_best_approximation_of_its_rank(ranks, rank):
    """Eckart-Young: the error is the norm of the singular values left out; at the rank of the mean there is none."""
    held = updates(ranks, range(1, len(ranks) + 1))
    found, expected = refactorised(rank).run(held), mean(held)
    assert found[f"{HEAD}.A"].shape == (rank, 7)
    assert found[f"{HEAD}.B"].shape == (5, rank)
    left_out = torch.linalg.svdvals(expected)[rank:].norm()
    torch.testing.assert_close((product(found) - expected).norm(), left_out, rtol=0, atol=1e-9)


def test_the_signs_of_a_decomposition_are_fixed():
    """Negating both factors, or reordering the stack, is the same matrix and gives the same pair."""
    left, right = pair(4)[f"{HEAD}.B"], pair(4)[f"{HEAD}.A"]
    first = truncated_svd(left, right, 3)
    for other in (truncated_svd(-left, -right, 3), truncated_svd(left.flip(1), right.flip(0), 3)):
        torch.testing.assert_close(first, other)
    vectors = first[1] / first[1].norm(dim=0)
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(first[0] @ first[0].T, torch.eye(3, dtype=torch.float64))


def test_mean_of_factors_and_residual_are_the_mean_of_products():
    held = updates([3, 3, 3], [5, 1, 2])
    found = averaged_with_residual(3.0).run(held)
    torch.testing.assert_close(product(found) + found[f"{HEAD}.residual"], mean(held))
    torch.testing.assert_close(found[f"{HEAD}.A"], sum(one.examples * one.delta[f"{HEAD}.A"] for one in held) / 8)
    assert f"{HEAD}.residual" not in averaged_with_residual(3.0).run(held[:1])


def test_different_ranks_under_a_mean_name_leaf_and_clients():
    with pytest.raises(ValueError, match=rf"leaf '{HEAD}.A': client '0' sent shape \(3, 7\), client '1' \(2, 7\)"):
        averaged_with_residual(3.0).run(updates([3, 2], [1, 1]))


@given(st.integers(1, 6), st.integers(0, 4))
def test_padding_keeps_the_product_and_cutting_undoes_it(rank, more):
    tree = pair(rank)
    wide = padded(tree, rank + more)
    assert len(wide[f"{HEAD}.A"]) == rank + more
    torch.testing.assert_close(product(wide), product(tree))
    torch.testing.assert_close(cut(wide, rank), tree)
    assert cut(tree, rank + more) == tree
    assert padded(tree, rank) == tree


def test_weights_by_the_norm_of_the_product():
    """||B A|| of 2 and 6: weights 1/4 and 3/4, whatever the numbers of examples."""
    one, other = ({f"{HEAD}.A": torch.tensor([[2.0]]), f"{HEAD}.B": torch.tensor([[size]])} for size in (1.0, 3.0))
    held = [Update(client="1", delta=one, examples=100), Update(client="2", delta=other, examples=1)]
    assert by_product_norm.run(held)[f"{HEAD}.B"].item() == pytest.approx(1 / 4 + 3 * 3 / 4)


def test_nobody_and_nothing():
    assert stacked(1.0).run([]) == refactorised(2).run([]) == averaged_with_residual(1.0).run([]) == {}
    zero = {f"{HEAD}.A": torch.ones(1, 2), f"{HEAD}.B": torch.zeros(2, 1)}
    assert by_product_norm.run([Update(client="1", delta=zero, examples=1)])[f"{HEAD}.A"].isfinite().all()


def test_a_leaf_that_is_no_pair_is_averaged_by_examples():
    held = [
        Update(client=str(size), delta={"layers.0.router.weight": torch.tensor([float(size)])} | pair(size), examples=size)
        for size in (1, 3)
    ]
    for merge in (stacked(1.0), refactorised(2)):
        assert merge.run(held)["layers.0.router.weight"].item() == 2.5
