"""Several terms at one linear layer, against weights merged by hand."""

from __future__ import annotations

import pytest
import torch

from fedgraft.address import MIX, as_own
from tests.conftest import PROVEN
from tests.grafts.twins import logits, merge_attention, random_leaves

SCALE = 6 / 4


def merged(base, *parts):
    """W + sum of share x scale B A over (tree, share)."""
    for tree, share in parts:
        merge_attention(base, tree, SCALE * share)
    return base


@pytest.mark.parametrize("family", PROVEN)
def test_second_pairs_are_added_and_blended(tiny_base, tiny_graft, family):
    model = tiny_graft(family)
    first, second = (random_leaves(model.fresh_adapters(0), seed) for seed in (1, 2))
    for mix, shares in ((None, (1, 1)), (torch.tensor(0.3), (0.7, 0.3))):
        tree = first | as_own(second) | ({} if mix is None else {MIX: mix})
        with model.using(tree, []):
            found = logits(model.base)
        expected = logits(merged(tiny_base(family), (first, shares[0]), (second, shares[1])))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with model.using(as_own(second), []):
        torch.testing.assert_close(logits(model.base), logits(merged(tiny_base(family), (second, 1))), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", PROVEN)
def test_rows_blend_by_shares_of_their_own(tiny_graft, family):
    """As every row alone with its share, at shared experts too, which see rows and tokens in one list."""
    model = tiny_graft(family, targets=("q", "v", "linear"))
    first, second = (random_leaves(model.fresh_adapters(0), seed) for seed in (1, 2))
    assert any("shared" in key for key in first) == (family == "qwen2_moe")
    shares, ids = torch.tensor([0.0, 0.3, 1.0]), torch.arange(36).reshape(3, 12)
    with torch.no_grad():
        with model.using(first | as_own(second) | {MIX: shares}, []):
            found = model.base.model(ids).logits
        for row, share in enumerate(shares):
            with model.using(first | as_own(second) | {MIX: share}, []):
                torch.testing.assert_close(found[row], model.base.model(ids[row : row + 1]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mix", "one"), [(0.0, 0), (1.0, 1)])
def test_the_ends_of_a_blend_are_the_single_pairs_bit_for_bit_in_training_too(tiny_graft, mix, one):
    """Same dropout for both; and the pair without a share gets no gradient."""
    model = tiny_graft("olmoe", dropout=0.3)
    trees = [random_leaves(model.fresh_adapters(0), seed) for seed in (1, 2)]
    trees = [{key: leaf.requires_grad_() for key, leaf in tree.items()} for tree in trees]
    ids = torch.arange(24).reshape(2, 12)
    model.base.model.train()
    with model.using(trees[one], []):
        torch.manual_seed(0)
        alone = model.base.model(ids).logits
        alone.square().mean().backward()
    expected = [leaf.grad.clone() for leaf in trees[one].values()]
    for leaf in trees[one].values():
        leaf.grad = None
    with model.using(trees[0] | as_own(trees[1]) | {MIX: torch.tensor(mix)}, []):
        torch.manual_seed(0)
        both = model.base.model(ids).logits
        both.square().mean().backward()
    assert torch.equal(alone, both)
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(trees[one].values(), expected, strict=True))
    assert not any(leaf.grad.any() for leaf in trees[1 - one].values())


@pytest.mark.parametrize("stack", [False, True])
def test_residuals_are_added_without_scale_and_without_dropout(tiny_base, tiny_graft, stack):
    """B A of rank 3 as a pair and as a matrix, with and without an ordinary pair beside it; in training mode too."""
    model = tiny_graft("qwen2_moe", dropout=0.5)
    pairs = random_leaves(model.fresh_adapters(0))
    rng = torch.Generator().manual_seed(3)
    residual, base = {}, tiny_base("qwen2_moe")
    for key in [key for key in pairs if key.endswith(".A")]:
        head, (_, inputs), outputs = key[:-2], pairs[key].shape, len(pairs[f"{key[:-2]}.B"])
        factor_a, factor_b = torch.randn(3, inputs, generator=rng) * 0.1, torch.randn(outputs, 3, generator=rng) * 0.1
        layer, role = head.split(".")[1], head.split(".")[3]
        base.model.get_submodule(f"model.layers.{layer}.self_attn.{role}_proj").weight.data += factor_b @ factor_a
        parts = {f"{head}.residual.A": factor_a, f"{head}.residual.B": factor_b}
        residual |= parts if stack else {f"{head}.residual": factor_b @ factor_a}
    model.base.model.train()
    with model.using(residual, []):
        torch.testing.assert_close(logits(model.base), logits(base), rtol=1e-4, atol=1e-4)
    model.base.model.eval()
    with model.using(residual | pairs, []):
        torch.testing.assert_close(logits(model.base), logits(merge_attention(base, pairs, SCALE)), rtol=1e-4, atol=1e-4)


def test_half_a_pair_has_no_place(tiny_graft):
    model = tiny_graft("olmoe")
    tree = model.fresh_adapters(0)
    for part in ("A", "B"):
        half = {key: leaf for key, leaf in tree.items() if key.endswith(part)}
        for leaves in (half, as_own(half), {f"{key[:-2]}.residual.{part}": leaf for key, leaf in half.items()}):
            with pytest.raises(ValueError, match=r"has no place in this model"), model.using(leaves, []):
                pass
