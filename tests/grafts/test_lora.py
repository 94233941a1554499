"""Attention LoRA against weights merged by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedgraft.grafts.graft import GraftedModel
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.tree import digest
from tests.conftest import PROVEN
from tests.grafts.twins import logits, merge_attention, random_leaves

TARGETS = [("q", "k", "v"), ("q", "k", "v", "o"), ("o",)]


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize("targets", TARGETS)
def test_zero_is_the_base_and_any_other_the_merged_weights(tiny_base, tiny_graft, family, targets):
    """B = 0 bit for bit; W + alpha / rank B A to 1e-5."""
    model = tiny_graft(family, targets=targets)
    fresh = model.fresh_adapters(0)
    assert len(fresh) == 2 * 2 * len(targets)
    with model.using(fresh, []):
        assert torch.equal(logits(model.base), logits(tiny_base(family)))
    tree = random_leaves(fresh)
    with model.using(tree, []):
        torch.testing.assert_close(logits(model.base), logits(merge_attention(tiny_base(family), tree, 6 / 4)), rtol=1e-5, atol=1e-5)


def test_absent_pairs_are_off(tiny_base, tiny_graft):
    model = tiny_graft("qwen2_moe")
    tree = random_leaves(model.fresh_adapters(0))
    with model.using(tree, []):
        whole = logits(model.base)
    part = {key: leaf for key, leaf in tree.items() if key.startswith("layers.1.") or ".attention.k." in key}
    assert len(part) == 8
    with model.using(part, []):
        found = logits(model.base)
    torch.testing.assert_close(found, logits(merge_attention(tiny_base("qwen2_moe"), part, 6 / 4)), rtol=1e-5, atol=1e-5)
    assert (found - whole).abs().max() > 0.01


def test_fresh_factors(tiny_graft):
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), whose standard deviation is 1 / sqrt(3 in); B = 0; shapes by projection (4 heads, 2 for k and v)."""
    model = tiny_graft("olmoe", rank=64, alpha=64.0)
    tree = model.fresh_adapters(3)
    for layer in (0, 1):
        for role, outputs in (("q", 32), ("k", 16), ("v", 16)):
            factor_a, factor_b = (tree[f"layers.{layer}.attention.{role}.{part}"] for part in "AB")
            assert (tuple(factor_a.shape), tuple(factor_b.shape)) == ((64, 32), (outputs, 64))
            assert factor_a.abs().max() <= 32**-0.5
            assert factor_a.std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.1)
            assert abs(factor_a.mean().item()) < 5 * (3 * 32) ** -0.5 / (64 * 32) ** 0.5
            assert not factor_b.any()
    assert len({leaf.sum().item() for key, leaf in tree.items() if key.endswith("A")}) == 6


def test_fresh_factors_depend_on_seed_and_address_alone(tiny_graft):
    few, all_four = tiny_graft("olmoe").fresh_adapters(0), tiny_graft("olmoe", targets=("o", "v", "q", "k")).fresh_adapters(0)
    assert digest({key: all_four[key] for key in few}) == digest(few)
    assert digest(tiny_graft("olmoe").fresh_adapters(1)) != digest(few)


def test_dropout_acts_while_training_alone(tiny_base, tiny_graft):
    model = tiny_graft("olmoe", dropout=0.5)
    tree = random_leaves(model.fresh_adapters(0))
    with model.using(tree, []):
        torch.testing.assert_close(logits(model.base), logits(merge_attention(tiny_base("olmoe"), tree, 6 / 4)), rtol=1e-5, atol=1e-5)
        model.base.model.train()
        assert not torch.equal(logits(model.base), logits(model.base))


def test_a_projection_that_is_not_there_is_named(tiny_base):
    base = tiny_base("olmoe")
    without = [part for part in base.projections if part.name != "k"]
    with pytest.raises(ValueError, match=r"lora.targets: this model has no 'k' layer that can be adapted; it has linear, o, q, v"):
        GraftedModel(replace(base, projections=without), LoraSettings(), GraftSettings())


def test_scale_takes_fractions(tiny_base, tiny_graft):
    """alpha = pi, rank 4."""
    model = tiny_graft("mixtral", alpha=math.pi)
    tree = random_leaves(model.fresh_adapters(0))
    with model.using(tree, []):
        torch.testing.assert_close(
            logits(model.base), logits(merge_attention(tiny_base("mixtral"), tree, math.pi / 4)), rtol=1e-5, atol=1e-5
        )


def test_it_is_pefts_lora(tiny_base, tiny_graft):
    """The same factors in PEFT's own layers: logits and gradients agree bit for bit."""
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny_graft("olmoe", targets=("q", "o"))
    tree = {key: leaf.requires_grad_() for key, leaf in random_leaves(model.fresh_adapters(0)).items()}
    network = tiny_base("olmoe").model
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, target_modules=["q_proj", "o_proj"])
    inject_adapter_in_model(config, network, "peft")
    factors = {}
    for key, leaf in tree.items():
        _, layer, _, role, part = key.split(".")
        module = network.get_submodule(f"model.layers.{layer}.self_attn.{role}_proj")
        factors[key] = getattr(module, f"lora_{part}")["peft"].weight
        factors[key].data.copy_(leaf.detach())
    network.eval()
    ids = torch.randint(3, 259, (2, 9))
    with model.using(tree, []):
        ours = model.base.model(ids).logits
        ours.square().mean().backward()
    theirs = network(ids).logits
    theirs.square().mean().backward()
    assert torch.equal(ours, theirs)
    for key, leaf in tree.items():
        assert torch.equal(leaf.grad, factors[key].grad)
