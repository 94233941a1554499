"""Swapping clients in and out of one frozen base."""

from __future__ import annotations

import pytest
import torch

from fedgraft.tree import combine, digest
from tests.conftest import PROVEN
from tests.grafts.twins import IDS, MASK, graft_by_hand, logits, merge_attention, random_leaves

EXPERTS = [[5], [2]]
KINDS = [("lora", "faithful"), ("full", "faithful"), ("lora", "preserving"), ("full", "preserving")]


def leaves(model, seed, experts=EXPERTS):
    return random_leaves(combine(model.fresh_adapters(0), model.fresh_side(experts, 0)), seed)


def test_clients_are_swapped_without_a_trace(tiny_base, tiny_graft):
    """a, then b, then nothing; a again is a; each equals the model changed by hand."""
    model, expected = tiny_graft("qwen2_moe"), logits(tiny_base("qwen2_moe"))
    clients = {"a": (leaves(model, 1), EXPERTS), "b": (leaves(model, 2, [[0], [7]]), [[0], [7]])}
    before, frozen = digest(clients["a"][0]), model.frozen_digest()
    seen = {}
    for name in ("a", "b", "a"):
        tree, experts = clients[name]
        with model.using(tree, experts):
            found = logits(model.base)
        assert torch.equal(logits(model.base), expected)
        assert torch.equal(seen.setdefault(name, found), found)
        twin = graft_by_hand(merge_attention(tiny_base("qwen2_moe"), tree, 6 / 4), tree, experts, 6 / 4)
        torch.testing.assert_close(found, logits(twin), rtol=1e-5, atol=1e-5)
    assert (seen["a"] - seen["b"]).abs().max() > 0.01
    assert digest(clients["a"][0]) == before
    assert model.frozen_digest() == frozen


def test_an_error_inside_leaves_the_base(tiny_base, tiny_graft):
    model = tiny_graft("olmoe")
    with pytest.raises(KeyError), model.using(leaves(model, 1), EXPERTS):
        raise KeyError
    assert torch.equal(logits(model.base), logits(tiny_base("olmoe")))


@pytest.mark.parametrize(
    "address",
    [
        "layers.0.router.weight",
        "layers.0.attention.o.A",  # not a target
        "layers.2.attention.q.A",  # no such layer
        "layers.0.side.1.mix.weight",  # no such graft
        "head.A",
    ],
)
def test_a_leaf_without_a_place_is_named_and_nothing_stays_in_use(tiny_base, tiny_graft, address):
    model = tiny_graft("olmoe")
    with (
        pytest.raises(ValueError, match=rf"leaf '{address}' has no place"),
        model.using(leaves(model, 1) | {address: torch.ones(1)}, EXPERTS),
    ):
        pass
    assert torch.equal(logits(model.base), logits(tiny_base("olmoe")))


def test_side_leaves_without_their_experts_are_refused(tiny_graft):
    model = tiny_graft("olmoe")
    with pytest.raises(ValueError, match=r"'layers.0.side.0.*has no place"), model.using(model.fresh_side(EXPERTS, 0), []):
        pass


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize(("train", "form"), KINDS)
def test_gradients_reach_every_leaf_and_nothing_else(tiny_graft, family, train, form):
    model = tiny_graft(family, train=train, form=form, targets=("q", "k", "v", "o"), gate_start="low")
    tree = {key: leaf.requires_grad_() for key, leaf in leaves(model, 1).items()}
    with model.using(tree, EXPERTS):
        model.base.model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits.square().mean().backward()
    for key, leaf in tree.items():
        assert leaf.grad is not None, key
        assert leaf.grad.any(), key
    assert all(parameter.grad is None for parameter in model._frozen.values())


@pytest.mark.parametrize("family", PROVEN)
def test_generation_with_a_cache_is_the_argmax_of_full_forwards(tiny_graft, family):
    model = tiny_graft(family)
    ids = IDS[:, :6]
    with model.using(leaves(model, 1), EXPERTS), torch.no_grad():
        found = model.base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=-1)
        for _ in range(8):
            step = model.base.model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
            ids = torch.cat([ids, step[:, None]], 1)
    assert found.tolist() == ids.tolist()


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize(("train", "form"), KINDS)
def test_bfloat16_base_with_float32_leaves(tiny_base, tiny_graft, family, train, form):
    model = tiny_graft(family, base={"dtype": torch.bfloat16}, train=train, form=form)
    tree = leaves(model, 1)
    closed = {key: torch.zeros_like(leaf) if key.endswith(".B") else leaf for key, leaf in tree.items()}
    closed |= {f"layers.{layer}.side.0.mix.bias": torch.tensor(-torch.inf) for layer in (0, 1)}
    with model.using(closed, EXPERTS):
        assert torch.equal(logits(model.base), logits(tiny_base(family, dtype=torch.bfloat16)))
    exact = tiny_graft(family, train=train, form=form)
    with model.using(tree, EXPERTS), exact.using(tree, EXPERTS):
        found, expected = logits(model.base), logits(exact.base)
    assert found.dtype == torch.bfloat16
    distance, size = (found.float() - expected).norm(), expected.norm()
    assert distance < 0.1 * size  # bfloat16 keeps 8 bits, and a token near a tie may be routed otherwise
    for leaf in tree.values():
        leaf.requires_grad_()
    with model.using(tree, EXPERTS):
        model.base.model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits.float().square().mean().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all() for leaf in tree.values())


def test_frozen_digest_covers_every_pretrained_number(tiny_base, tiny_graft):
    model = tiny_graft("mixtral")
    before = model.frozen_digest()
    assert before == tiny_graft("mixtral").frozen_digest()
    names = {name for name, _ in tiny_base("mixtral").model.named_parameters()}
    assert set(model._frozen) == names
    model.base.sites[1].experts.down_proj.data[7, 31, 15] += 1e-3
    assert model.frozen_digest() != before
