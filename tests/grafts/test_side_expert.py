"""The grafted expert against the layer's definition, written out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from fedgraft.grafts.side_expert import GraftSettings, SideExperts, side_shapes
from fedgraft.tree import combine, count
from tests.conftest import PROVEN
from tests.grafts.twins import IDS, graft_by_hand, logits, random_leaves

EXPERTS = {1: [[5], [2]], 2: [[5, 0], [2, 7]]}
TRAIN, FORMS = ["lora", "full"], ["faithful", "preserving"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("form", FORMS)
def test_gate_at_zero_is_the_base_bit_for_bit(tiny_base, tiny_graft, family, train, form):
    model = tiny_graft(family, train=train, form=form)
    tree = random_leaves(model.fresh_side(EXPERTS[1], 0))
    expected = logits(tiny_base(family))
    with model.using(tree, EXPERTS[1]):
        assert not torch.equal(logits(model.base), expected)  # the gate is what closes it
    closed = tree | {f"layers.{site.layer}.side.0.mix.bias": torch.tensor(-math.inf) for site in model.base.sites}
    with model.using(closed, EXPERTS[1]):
        assert torch.equal(logits(model.base), expected)


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_layer", [1, 2])
def test_layer_is_its_definition(tiny_base, tiny_graft, family, train, form, per_layer):
    """Random leaves, and gates with a bias; with two grafts the sum of both."""
    model = tiny_graft(family, train=train, form=form, per_layer=per_layer, gate_start="low")
    experts = EXPERTS[per_layer]
    tree = random_leaves(model.fresh_side(experts, 0))
    twin = graft_by_hand(tiny_base(family), tree, experts, scale=6 / 4, preserving=form == "preserving")
    with model.using(tree, experts):
        torch.testing.assert_close(logits(model.base), logits(twin), **CLOSE)


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize("train", TRAIN)
def test_faithful_start_is_the_source_behind_its_router_row(tiny_base, tiny_graft, family, train):
    """Before training y + sigmoid(W_e . x) E_e(x): the twin has neither low-rank terms nor leaves, only the router's rows."""
    model, base = tiny_graft(family, train=train), tiny_base(family)
    rows = {f"layers.{layer}.side.0.mix.weight": base.sites[layer].router.weight[EXPERTS[1][layer][0]].clone() for layer in (0, 1)}
    tree = model.fresh_side(EXPERTS[1], 0)
    assert {key: leaf.tolist() for key, leaf in tree.items() if ".mix." in key} == {key: row.tolist() for key, row in rows.items()}
    with model.using(tree, EXPERTS[1]):
        torch.testing.assert_close(logits(model.base), logits(graft_by_hand(base, rows, EXPERTS[1], scale=0.0)), **CLOSE)


def test_low_gate_starts_at_sigmoid_of_minus_two(tiny_base, tiny_graft):
    model, base = tiny_graft("olmoe", gate_start="low"), tiny_base("olmoe")
    tree = model.fresh_side(EXPERTS[1], 0)
    for layer in (0, 1):
        assert tree[f"layers.{layer}.side.0.mix.weight"].tolist() == [0.0] * 32
        assert tree[f"layers.{layer}.side.0.mix.bias"].item() == -2
    odds = {f"layers.{layer}.side.0.mix.weight": torch.zeros(32) for layer in (0, 1)}
    odds |= {f"layers.{layer}.side.0.mix.bias": torch.tensor(math.log(0.11920292 / (1 - 0.11920292))) for layer in (0, 1)}  # 1 / (1 + e^2)
    with model.using(tree, EXPERTS[1]):
        torch.testing.assert_close(logits(model.base), logits(graft_by_hand(base, odds, EXPERTS[1], scale=0.0)), **CLOSE)


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize("train", TRAIN)
def test_preserving_start_is_the_base(tiny_base, tiny_graft, family, train):
    model = tiny_graft(family, train=train, form="preserving", per_layer=2)
    with model.using(model.fresh_side(EXPERTS[2], 0), EXPERTS[2]):
        torch.testing.assert_close(logits(model.base), logits(tiny_base(family)), **CLOSE)


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize("form", FORMS)
def test_full_and_lora_start_alike(tiny_graft, family, form):
    found = []
    for train in TRAIN:
        model = tiny_graft(family, train=train, form=form)
        with model.using(model.fresh_side(EXPERTS[1], 0), EXPERTS[1]):
            found.append(logits(model.base))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_two_equal_grafts_add_twice_the_one(tiny_graft):
    """In one layer alone: y2 - y0 = 2 (y1 - y0), as differences of the experts module's own output."""
    outputs = []
    model = tiny_graft("qwen2_moe")
    site = model.base.sites[0]
    site.experts.register_forward_hook(lambda module, args, output: outputs.append(output))
    one = random_leaves(model.fresh_side([[3], []], 0))
    two = combine(one, {key.replace("side.0", "side.1"): leaf for key, leaf in one.items()})
    for tree, experts in (({}, []), (one, [[3], []]), (two, [[3, 3], []])):
        with model.using(tree, experts):
            logits(model.base)
    none, single, double = outputs
    torch.testing.assert_close(double - none, 2 * (single - none), rtol=1e-5, atol=1e-6)
    assert (single - none).abs().max() > 0.01


def test_leaves_have_the_documented_addresses_shapes_and_dtype(tiny_graft):
    lora = tiny_graft("mixtral", base={"dtype": torch.bfloat16}, gate_start="low").fresh_side(EXPERTS[1], 0)
    head = "layers.1.side.0"
    expected = {f"{head}.mix.weight": (32,), f"{head}.mix.bias": ()}
    for name, inputs, outputs in (("gate", 32, 16), ("up", 32, 16), ("down", 16, 32)):
        expected |= {f"{head}.expert.{name}.A": (4, inputs), f"{head}.expert.{name}.B": (outputs, 4)}
    assert {key: tuple(leaf.shape) for key, leaf in lora.items() if key.startswith("layers.1.")} == expected
    assert {leaf.dtype for leaf in lora.values()} == {torch.float32}
    full = tiny_graft("mixtral", train="full").fresh_side(EXPERTS[1], 0)
    assert count(full) == 2 * (3 * 16 * 32 + 32)
    assert "layers.1.side.0.expert.down.weight" in full


def test_full_graft_is_a_copy_and_lora_aliases_its_source(tiny_graft):
    for train in TRAIN:
        model = tiny_graft("qwen2_moe", train=train)
        tree = model.fresh_side(EXPERTS[1], 0)
        base_memory = {parameter.untyped_storage().data_ptr() for parameter in model.base.model.parameters() if not parameter.is_meta}
        assert not base_memory & {leaf.untyped_storage().data_ptr() for leaf in tree.values()}
        with model.using(tree, EXPERTS[1]):
            for site, chosen in zip(model.base.sites, EXPERTS[1], strict=True):
                (side,) = model._side._active[site.layer]
                assert side.source.gate.data_ptr() == site.experts.gate_up_proj[chosen[0]].data_ptr()
                assert side.source.down.data_ptr() == site.experts.down_proj[chosen[0]].data_ptr()


def test_fresh_leaves_depend_on_seed_and_address_alone(tiny_graft):
    model = tiny_graft("olmoe")
    cases = [(EXPERTS[1], 0), (EXPERTS[1], 0), (EXPERTS[1], 1), ([[0], [1]], 0)]
    tree, again, other, elsewhere = (model.fresh_side(experts, seed) for experts, seed in cases)
    for key, leaf in tree.items():
        assert torch.equal(leaf, again[key])
        assert torch.equal(leaf, other[key]) == (not key.endswith(".A"))
        assert torch.equal(leaf, elsewhere[key]) == (".mix." not in key)
        if key.endswith(".B"):
            assert not leaf.any()


def test_dropout_acts_while_training_alone(tiny_base, tiny_graft):
    model = tiny_graft("olmoe", dropout=0.5)
    tree = random_leaves(model.fresh_side(EXPERTS[1], 0))
    twin = graft_by_hand(tiny_base("olmoe"), tree, EXPERTS[1], scale=6 / 4)
    with model.using(tree, EXPERTS[1]):
        torch.testing.assert_close(logits(model.base), logits(twin), **CLOSE)
        model.base.model.train()
        assert not torch.equal(logits(model.base), logits(model.base))


@pytest.mark.parametrize("wrong", [{"per_layer": 0}, {"form": "faithfull"}, {"train": "none"}, {"gate_start": "high"}, {"layers": 2}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValidationError):
        GraftSettings(**wrong)


@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate_start", ["router_row", "low"])
def test_a_fixed_gate_stays_at_its_start(tiny_graft, train, form, gate_start):
    """It is no leaf, and predicts as a learned one whose leaves are those of its start."""
    learned = tiny_graft("qwen2_moe", train=train, form=form, gate_start=gate_start, per_layer=2)
    fixed = tiny_graft("qwen2_moe", train=train, form=form, gate_start=gate_start, per_layer=2, gate="fixed")
    start = learned.fresh_side(EXPERTS[2], 0)
    own = {key: leaf for key, leaf in start.items() if ".mix." not in key}
    assert fixed.fresh_side(EXPERTS[2], 0).keys() == own.keys() == side_shapes(fixed.base, fixed.graft_settings, fixed.lora_settings).keys()
    moved = random_leaves(own)
    with learned.using(start | moved, EXPERTS[2]):
        expected = logits(learned.base)
    with fixed.using(moved, EXPERTS[2]):
        assert torch.equal(logits(fixed.base), expected)


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize("form", FORMS)
def test_without_a_gate_the_expert_is_added_with_weight_one(tiny_base, tiny_graft, family, form):
    """The twin's gate is sigmoid(50), which is 1."""
    model = tiny_graft(family, form=form, gate="off")
    tree = random_leaves(model.fresh_side(EXPERTS[1], 0))
    assert not [key for key in tree if ".mix." in key]
    open_wide = {f"layers.{layer}.side.0.mix.weight": torch.zeros(32) for layer in (0, 1)}
    open_wide |= {f"layers.{layer}.side.0.mix.bias": torch.tensor(50.0) for layer in (0, 1)}
    twin = graft_by_hand(tiny_base(family), tree | open_wide, EXPERTS[1], scale=6 / 4, preserving=form == "preserving")
    seen = []
    with model.using(tree, EXPERTS[1]), model.watching_gates(lambda layer, number, gate: seen.append(gate)):
        torch.testing.assert_close(logits(model.base), logits(twin), **CLOSE)
    assert all(torch.equal(gate, torch.ones(24)) for gate in seen)


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize("train", TRAIN)
def test_in_place_is_the_base_with_the_source_expert_changed(tiny_base, tiny_graft, family, train):
    """Weights written into the pretrained parameters: of two experts, in the second layer."""
    model, base = tiny_graft(family, train=train, form="in_place", per_layer=2), tiny_base(family)
    experts = [[], [2, 7]]
    tree = random_leaves(model.fresh_side(experts, 0))
    assert not [key for key in tree if ".mix." in key]
    site = base.sites[1]
    for number, expert in enumerate(experts[1]):
        gate, up = site.experts.gate_up_proj.data[expert].chunk(2)
        for name, weight in (("gate", gate), ("up", up), ("down", site.experts.down_proj.data[expert])):
            head = f"layers.1.side.{number}.expert.{name}"
            weight.copy_(tree[f"{head}.weight"]) if train == "full" else weight.add_(6 / 4 * tree[f"{head}.B"] @ tree[f"{head}.A"])
    shares = {}
    with model.using(tree, experts), model.watching_gates(lambda layer, number, gate: shares.update({(layer, number): gate})):
        changed = logits(model.base)
    torch.testing.assert_close(changed, logits(base), **CLOSE)
    assert (changed - logits(tiny_base(family))).abs().max() > 0.01
    assert shares.keys() == {(1, 0), (1, 1)}
    assert all(0 < int((share > 0).sum()) < 24 for share in shares.values())  # the router's own weight, where it chose the expert


def test_in_place_trains_also_where_no_token_meets_the_expert(tiny_graft):
    """Its gradient is then zero, not missing."""
    model = tiny_graft("olmoe", form="in_place")
    model.base.sites[0].router.weight.data[:] = 0.0  # ties go to the same two experts for every token
    ids, index = IDS, []
    handle = model.base.sites[0].experts.register_forward_hook(lambda module, args, output: index.append(args[1]))
    logits(model.base)
    handle.remove()
    idle = min(set(range(8)) - set(index[0].flatten().tolist()))
    tree = {key: leaf.requires_grad_() for key, leaf in model.fresh_side([[idle], [0]], 0).items()}
    with model.using(tree, [[idle], [0]]):
        model.base.model(ids, use_cache=False).logits.sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for key, leaf in tree.items() if key.startswith("layers.0."))


def test_in_place_is_refused_where_weights_do_not_act_on_outputs(tiny_graft):
    model = tiny_graft("olmoe")
    anatomy = replace(model.base, sites=[replace(site, replaceable=False) for site in model.base.sites])
    with pytest.raises(ValueError, match=r"graft\.form: in_place: the experts of .* do not run one by one"):
        SideExperts(anatomy, GraftSettings(form="in_place"), model.lora_settings)


@pytest.mark.parametrize("family", PROVEN)
def test_a_mixture_starts_from_the_weighted_mean_of_weights(tiny_graft, family):
    model = tiny_graft(family, train="full", mixture=2)
    tree = model.fresh_side([[5], [2]], 0, mixture=[[(5, 0.75), (1, 0.25)], [(2, 0.5), (3, 0.5)]])
    for layer, parts in ((0, {5: 0.75, 1: 0.25}), (1, {2: 0.5, 3: 0.5})):
        experts = model.base.sites[layer].experts
        expected = sum(share * experts.down_proj[expert] for expert, share in parts.items())
        torch.testing.assert_close(tree[f"layers.{layer}.side.0.expert.down.weight"], expected.detach(), rtol=1e-6, atol=1e-7)
    rows = [model.base.family.router_row(model.base.sites[layer], expert) for layer, expert in ((0, 5), (1, 2))]
    assert all(torch.equal(tree[f"layers.{layer}.side.0.mix.weight"], row) for layer, row in enumerate(rows))  # of the best
    alone = model.fresh_side([[5], [2]], 0, mixture=[[(5, 1.0)], [(2, 1.0)]])
    plain = model.fresh_side([[5], [2]], 0)
    assert all(torch.equal(alone[key], plain[key]) for key in plain)


@pytest.mark.parametrize("other", [{"train": "lora"}, {"train": "full", "form": "preserving"}, {"train": "full", "per_layer": 2}])
def test_a_mixture_needs_weights_of_its_own(other):
    with pytest.raises(ValidationError, match="takes train: full, form: faithful and per_layer: 1"):
        GraftSettings(mixture=2, **other)


def test_on_and_off_are_what_yaml_makes_of_them():
    assert [GraftSettings(gate=gate).gate for gate in (True, False, "off", "fixed")] == ["learned", "off", "off", "fixed"]
