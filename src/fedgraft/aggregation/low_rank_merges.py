"""Merges of low-rank pairs by their product (alpha / r) B A, which a mean of A and a mean of B is not; ranks may differ per client.

Their updates hold whole factors: a change counted from zero, since the change of a product is not that of its factors. What they return is
taken up by a step of this file. Leaves that are no pair (router rows) are averaged by examples. All in float64, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedgraft.aggregation.merges import Merge, Update, by_examples, weighted_mean
from fedgraft.bundle import Bundle
from fedgraft.tree import Tree, partition


def refactorised(rank: int) -> Merge:
    """FlexLoRA: the weighted mean of B A / r over clients, cut by a singular value decomposition to pairs of `rank` with the same scale.

    A are the right singular vectors, B the left ones times the singular values; the sign makes the largest entry of a left vector positive.
    """

    def run(updates: Iterable[Update]) -> Tree:
        held = list(updates)
        merged = _rest(held)
        for head, pairs in _pairs(held):
            left, right = _stacked(pairs, float(rank))
            merged[f"{head}.A"], merged[f"{head}.B"] = truncated_svd(left, right, rank)
        return merged

    return Merge(run=run, needs_each_reply=True)


def averaged_with_residual(alpha: float) -> Merge:
    """FedEx-LoRA: the means of A and of B, and as dense `residual` what the mean of (alpha / r) B A has beyond their product."""

    def run(updates: Iterable[Update]) -> Tree:
        held = list(updates)
        merged = by_examples.run(held)
        for head, pairs in _pairs(held):
            left, right = _stacked(pairs, alpha)
            factor_a, factor_b = merged[f"{head}.A"], merged[f"{head}.B"]
            products = left @ right - alpha / len(factor_a) * (factor_b @ factor_a)
            if len(pairs) > 1:  # of one client it is nothing but rounding
                merged[f"{head}.residual"] = products
        return merged

    return Merge(run=run, needs_each_reply=True)


def stacked(alpha: float) -> Merge:
    """FLoRA: all clients' factors side by side, as `residual` pair whose product is the weighted mean of (alpha / r) B A, of any ranks."""

    def run(updates: Iterable[Update]) -> Tree:
        held = list(updates)
        merged = _rest(held)
        for head, pairs in _pairs(held):
            merged[f"{head}.residual.B"], merged[f"{head}.residual.A"] = _stacked(pairs, alpha)
        return merged

    return Merge(run=run, needs_each_reply=True)


def _norm(update: Update) -> float:
    squares = [(leaf @ update.delta[f"{key[:-2]}.A"]).square().sum() for key, leaf in update.delta.items() if key.endswith(".B")]
    return max(float(torch.stack(squares).sum().sqrt()) if squares else 0.0, torch.finfo(torch.float64).tiny)


by_product_norm = Merge(run=weighted_mean(_norm))
"""HetLoRA's sparsity-weighted mean of padded factors: weights in proportion to the Frobenius norm of all of a client's B A."""


def padded_mean(rank: int, weighted: Merge) -> Merge:
    """HetLoRA: a mean of the factors, those below `rank` padded with zeros."""

    def run(updates: Iterable[Update]) -> Tree:
        return weighted.run(Update(client=one.client, delta=padded(one.delta, rank), examples=one.examples) for one in updates)

    return Merge(run=run, weight=weighted.weight)


def take(state: Bundle, merged: Tree) -> Bundle:
    """Step: the merged leaves become the state; a residual is added to the one before."""
    shared = dict(state.tree("shared"))
    for key, leaf in merged.items():
        before = shared[key].double() if key.endswith(".residual") and key in shared else 0.0
        shared[key] = (leaf + before).float()
    return Bundle(trees={**state.trees, "shared": shared}, facts=state.facts)


def pile(state: Bundle, merged: Tree) -> Bundle:
    """Step: residual pairs are stacked on those before, and become one dense residual as soon as that has no more entries."""
    shared, single = dict(state.tree("shared")), {key: leaf for key, leaf in merged.items() if ".residual." not in key}
    for key in merged.keys() - single.keys():
        if key.endswith(".B"):
            continue
        head = key.removesuffix(".A")
        factor_a, factor_b = merged[f"{head}.A"], merged[f"{head}.B"]
        if head in shared:
            shared[head] = (shared[head].double() + factor_b @ factor_a).float()
            continue
        if f"{head}.A" in shared:
            factor_a = torch.cat([shared.pop(f"{head}.A").double(), factor_a])
            factor_b = torch.cat([shared.pop(f"{head}.B").double(), factor_b], dim=1)
        if factor_a.numel() + factor_b.numel() < len(factor_b) * factor_a.shape[1]:
            shared |= {f"{head}.A": factor_a.float(), f"{head}.B": factor_b.float()}
        else:
            shared[head] = (factor_b @ factor_a).float()
    return take(Bundle(trees={**state.trees, "shared": shared}, facts=state.facts), single)


def cut(tree: Mapping[str, Tensor], rank: int) -> Tree:
    """The first `rank` rows of A and columns of B, B scaled so that (alpha / rank) B A is the product's part; other leaves as they are."""
    found: Tree = dict(tree)
    for key in tree:
        if key.endswith(".A") and len(tree[key]) > rank:
            other = f"{key[:-2]}.B"
            found[key], found[other] = tree[key][:rank], tree[other][:, :rank] * (rank / len(tree[key]))
    return found


def padded(tree: Mapping[str, Tensor], rank: int) -> Tree:
    """The inverse of `cut` for what is left: rows and columns of zeros up to `rank`, the same product (alpha / r) B A."""
    found: Tree = dict(tree)
    for key in tree:
        if key.endswith(".A") and len(tree[key]) < rank:
            other, more = f"{key[:-2]}.B", rank - len(tree[key])
            found[key] = torch.nn.functional.pad(tree[key], (0, 0, 0, more))
            found[other] = torch.nn.functional.pad(tree[other] * (rank / len(tree[key])), (0, more))
    return found


def truncated_svd(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) whose product is the best one of that rank to left [out, R] @ right [R, in].

    Where the product has fewer than `rank` singular values, the rest is zeros. Decomposes a matrix of R x R at most.
    """
    outer, inner = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, sizes, vt = torch.linalg.svd(outer.R @ inner.R.T, full_matrices=False)
    u, vt = (outer.Q @ u)[:, :rank], (vt @ inner.Q.T)[:rank]
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    more = rank - len(vt)
    factor_b = torch.nn.functional.pad(u * signs * sizes[:rank], (0, more))
    return torch.nn.functional.pad(vt * signs.T, (0, 0, 0, more)), factor_b


def _rest(held: Sequence[Update]) -> Tree:
    """The mean of the leaves that are no pairs."""
    rest = [Update(client=one.client, delta=partition(one.delta, _is_factor)[1], examples=one.examples) for one in held]
    return by_examples.run(rest)


def _is_factor(key: str) -> bool:
    return key.endswith((".A", ".B"))


def _pairs(held: Sequence[Update]) -> Iterator[tuple[str, list[tuple[Tensor, Tensor, int]]]]:
    """(head, [(A, B, examples) of its holders]) for every head that anybody holds."""
    heads = dict.fromkeys(key[:-2] for one in held for key in one.delta if key.endswith(".A"))
    for head in heads:
        yield head, [(one.delta[f"{head}.A"], one.delta[f"{head}.B"], one.examples) for one in held if f"{head}.A" in one.delta]


def _stacked(pairs: Sequence[tuple[Tensor, Tensor, int]], alpha: float) -> tuple[Tensor, Tensor]:
    """(left [out, R], right [R, in]), R the sum of the ranks, whose product is the weighted mean of (alpha / r) B A."""
    total = sum(examples for _, _, examples in pairs)
    left = torch.cat([factor_b * (examples / total * alpha / len(factor_a)) for factor_a, factor_b, examples in pairs], dim=1)
    return left, torch.cat([factor_a for factor_a, _, _ in pairs])
