"""What holds for every MoE causal language model of the installed transformers, on tiny random twins."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedgraft.bundle import Bundle
from fedgraft.moe.catalogue import families
from fedgraft.moe.family import anatomy_of, router_matrix
from fedgraft.moe.layered import open_layered
from fedgraft.moe.load import load_base
from fedgraft.moe.padding import Compaction, spared
from fedgraft.moe.routing import watching
from fedgraft.moe.settings import ModelSettings
from fedgraft.selection.choose import choose
from fedgraft.selection.profile import measure
from fedgraft.selection.streamed import measure_streamed
from fedgraft.tree import equal
from tests.families.conftest import CHOSEN, chosen, leaves, merge_by_hand
from tests.families.twins import E, H, ids, shared_twin, twin
from tests.selection.brute import Rows

SUPPORTED = [row["name"] for row in families() if row["supported"]]
WITHOUT = {row["name"]: row["reason"] for row in families() if not row["supported"]}
every_family = pytest.mark.parametrize("name", SUPPORTED)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PADDED = {"deepseek_v4", "gemma4", "gemma4_text", "glm4_moe_lite", "jetmoe", "llama4", "llama4_text"}
READ_ON = {"inkling2_text", "inkling_text", "zaya"}
"""Families in which something reads other positions of the last MoE block's output: a convolution, a layer after it."""


@torch.no_grad()
def logits(model):
    return model(input_ids=ids(), use_cache=False).logits


def seen_in(anatomy, tokens=None):
    """What every MoE layer did in one forward."""
    seen = []
    with torch.no_grad(), watching(anatomy.sites, lambda site, routed: seen.append(routed)):
        anatomy.model(input_ids=ids() if tokens is None else tokens, use_cache=False)
    return seen


def test_at_least_fifty_are_supported():
    assert len(SUPPORTED) >= 50


def test_the_list_holds_every_causal_model_whose_configuration_speaks_of_experts():
    """Found independently: by the fields of all causal configurations, not by the source text."""
    spoken = set()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = AutoConfig.for_model(name).get_text_config()
        except Exception:  # its defaults are refused by its own checks; none of the kind is an MoE
            continue
        fields = {key for key, value in vars(config).items() if value is not None and not key.startswith("_")}
        if any("expert" in field for field in fields) or "ffn_config" in fields:
            spoken.add(name)
    assert spoken - set(SUPPORTED) <= {"doge"}


@every_family
def test_an_expert_cut_out_is_the_blocks_own(name):
    """The layer's routed output is the weighted sum of the experts that were cut out, for every token."""
    anatomy = anatomy_of(shared_twin(name))
    for site, routed in zip(anatomy.sites, seen_in(anatomy), strict=True):
        assert routed.index.shape[1] == site.top_k
        assert site.inputs_width == routed.x.shape[1]
        total = torch.zeros_like(routed.y) + (site.block.bias if name == "jetmoe" else 0)  # added once, after the experts
        for token, place in torch.cartesian_prod(torch.arange(len(routed.x)), torch.arange(site.top_k)).tolist():
            number, weight = int(routed.index[token, place]), routed.weight[token, place]
            x = routed.x[token : token + 1]
            if number >= site.num_experts:
                total[token] += weight * x[0]
            elif name.startswith("llama4"):  # the score acts on the input
                total[token] += anatomy.family.expert(site, number)(weight * x)[0]
            else:
                total[token] += weight * anatomy.family.expert(site, number)(x)[0]
        own = routed.y - _shared_output(site, routed.x) if name.startswith("llama4") else routed.y
        assert own.abs().mean() > 0.01
        torch.testing.assert_close(total, own, rtol=1e-5, atol=1e-5)


def _shared_output(site, x):
    """Llama 4's block is watched as a whole, so its output holds the shared expert's."""
    with torch.no_grad():
        return sum(shared(x) for shared in site.shared)


@every_family
def test_every_expert_through_each_implementation(name):
    """One expert for all tokens, weight 1, as the experts module itself computes it: eager, grouped, batched."""
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        anatomy = anatomy_of(twin(name, implementation) if implementation != "grouped_mm" else shared_twin(name))
        site = anatomy.sites[-1]
        if not site.replaceable:
            assert name in {"llama4", "llama4_text", "jetmoe"}
            return
        x = torch.randn(7, H)
        for number in range(site.num_experts):
            with torch.no_grad():
                own = site.experts(x, torch.full((7, 2), number), torch.full((7, 2), 0.5)).reshape(7, H)
            torch.testing.assert_close(anatomy.family.expert(site, number)(x), own, rtol=1e-5, atol=1e-5)


@every_family
def test_closed_gates_give_the_base_bit_for_bit_and_the_preserving_form_starts_as_the_base(grafted, name):
    base = logits(shared_twin(name))
    model = grafted(name, form="preserving")
    fresh = model.fresh_adapters(0) | model.fresh_side(chosen(model), 0)
    with model.using(fresh, chosen(model)):
        torch.testing.assert_close(logits(model.base.model), base, rtol=1e-5, atol=1e-5)
    model = grafted(name)
    opened = model.fresh_adapters(0) | {key: leaf for key, leaf in leaves(model).items() if ".side." in key}
    closed = opened | {f"layers.{site.layer}.side.0.mix.bias": torch.tensor(-math.inf) for site in model.base.sites}
    with model.using(opened, chosen(model)):
        assert (logits(model.base.model) - base).abs().max() > 1e-4  # the gate is what closes it
    with model.using(closed, chosen(model)):
        assert torch.equal(logits(model.base.model), base)
    assert torch.equal(logits(model.base.model), base)  # and nothing is left behind


@every_family
def test_a_graft_adds_its_gated_expert_where_the_routed_output_leaves(grafted, name):
    """In the last MoE layer: y + sigmoid(-2) E(x) before anything is trained."""
    model = grafted(name, train="full")
    before = seen_in(model.base)[-1]
    after, site = [], model.base.sites[-1]
    handle = site.hooked.register_forward_hook(lambda module, args, output: after.append(output))
    only_last = [*([[]] * (len(model.base.sites) - 1)), [CHOSEN]]
    with model.using(model.fresh_side(only_last, 0), only_last):
        logits(model.base.model)
    handle.remove()
    output = after[0][0] if isinstance(after[0], tuple) else after[0]
    expected = before.y + model.base.family.expert(site, CHOSEN)(before.x) / (1 + math.exp(2))
    torch.testing.assert_close(output.reshape(before.y.shape), expected, **CLOSE)


@every_family
def test_the_gate_starts_at_the_routers_own_row(grafted, name):
    """The row's logit for the experts' inputs, where the router is linear in them; elsewhere the remedy is named."""
    model = grafted(name, gate_start="router_row")
    if name == "zaya":
        with pytest.raises(ValueError, match=r"no router row to start a gate from; set graft\.gate_start: low"):
            model.fresh_side(chosen(model), 0)
        return
    tree = model.fresh_side(chosen(model), 0)
    for site, routed in zip(model.base.sites, seen_in(model.base), strict=True):
        row = tree[f"layers.{site.layer}.side.0.mix.weight"]
        if name.startswith("gemma4"):
            scaled = routed.x / site.block.pre_feedforward_layernorm_2.weight * site.router.scale * site.router.scalar_root_size
            torch.testing.assert_close(routed.x @ row, scaled @ site.router.proj.weight[CHOSEN], **CLOSE)
        else:
            assert torch.equal(row, router_matrix(site)[CHOSEN])


@every_family
def test_selection_finds_a_planted_expert(name):
    """Every token is routed to expert 6 with all the weight: R is that expert, so its error is 0 and all others' is not."""
    anatomy = anatomy_of(twin(name))

    def planted(site, call):
        index, weight = site_routing[site.layer](site, call)
        slots = torch.arange(index.shape[1])
        return ((6 + slots) % E).expand_as(index), (slots == 0).to(weight.dtype).expand_as(weight)

    site_routing = {site.layer: site.routing for site in anatomy.sites}
    sites = [replace(site, routing=planted) for site in anatomy.sites]
    base = prepare_again(anatomy, sites)
    profile = measure(base, [Rows(ids(), torch.ones_like(ids()))], 20)
    assert choose("reconstruction", profile, 1, None) == [[6] for _ in sites]
    relative = profile.error_LE / profile.full_sq_L[:, None]
    assert relative[:, 6].abs().max() < 1e-6
    assert relative[:, [number for number in range(E) if number != 6]].min() > 1e-3


@every_family
def test_selection_rebuilds_what_the_layer_put_out(name):
    """||R||^2 with the model's own weights is that of the layer's routed output, experts that compute nothing included."""
    anatomy = anatomy_of(shared_twin(name))
    seen = seen_in(anatomy)
    profile = measure(prepare_again(anatomy, anatomy.sites), [Rows(ids(), torch.ones_like(ids()))], 20)
    for layer, (site, routed) in enumerate(zip(anatomy.sites, seen, strict=True)):
        used = torch.stack([(routed.index == number).any(-1).sum() for number in range(site.num_experts)])
        assert profile.count_LE[layer].tolist() == used.tolist()
        if name.startswith("llama4"):  # its scores act on the inputs, so the output is no multiple of R
            continue
        own = routed.y.double() - (site.block.bias.double() if name == "jetmoe" else 0)
        torch.testing.assert_close(profile.raw_full_sq_L[layer], own.square().sum(), rtol=1e-4, atol=0)


def prepare_again(anatomy, sites):
    """The anatomy with other sites, as a base."""
    from fedgraft.moe.load import prepare

    return replace(prepare("planted", anatomy.model, None, "planted"), sites=sites)


@every_family
def test_backward_reaches_exactly_the_leaves(grafted, name):
    """Every leaf that is in use has a gradient, no pretrained parameter has; and with gradient checkpointing they are the same."""
    model = grafted(name)
    network = model.base.model
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            if not network.supports_gradient_checkpointing:
                break
            switch = getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)
            key = "activation" if hasattr(network, "activation_checkpointing_enable") else "gradient"
            switch(**{f"{key}_checkpointing_kwargs": {"use_reentrant": False}})
            network.train()
            for site in model.base.sites:
                site.router.eval()
        tree = {key: leaf.requires_grad_() for key, leaf in leaves(model).items()}
        with model.using(tree, chosen(model)):
            network(input_ids=ids(), use_cache=False).logits.float().square().mean().backward()
        found.append({key: leaf.grad for key, leaf in tree.items()})
    without = [key for key, grad in found[0].items() if grad is None or not grad.any()]
    assert without == []
    assert all(parameter.grad is None for parameter in network.parameters() if not parameter.is_meta)
    for key, grad in found[0].items():
        torch.testing.assert_close(found[-1][key], grad, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@every_family
@pytest.mark.parametrize(
    "targets", [None, ("linear",), ("router",), ("experts",)], ids=lambda targets: targets[0] if targets else "default"
)
def test_lora_reaches_what_it_says(grafted, name, targets):
    """The same leaves written into the weights by hand give the same logits; B = 0 is the base."""
    if name.startswith(("llama4", "jetmoe", "zaya", "gemma4")) and targets in {("router",), ("experts",)}:
        reasons = {("llama4", "experts"), ("llama4_text", "experts"), ("jetmoe", "experts"), ("zaya", "router")}
        if (name, targets[0]) in reasons:
            with pytest.raises(ValueError, match=rf"lora.targets.*leave '{targets[0]}' out"):
                grafted(name, targets=targets)
            return
    model = grafted(name, "eager", targets=targets)
    fresh = model.fresh_adapters(0)
    with model.using(fresh, []):
        torch.testing.assert_close(logits(model.base.model), logits(twin(name, "eager")), rtol=1e-5, atol=1e-5)
    rng = torch.Generator().manual_seed(2)
    tree = {key: leaf + 0.1 * torch.randn(leaf.shape, generator=rng) for key, leaf in fresh.items()}
    by_hand = twin(name, "eager")
    merge_by_hand(by_hand, anatomy_of(by_hand), tree)
    with model.using(tree, []):
        changed = logits(model.base.model)
    torch.testing.assert_close(changed, logits(by_hand), **CLOSE)
    assert (changed - logits(shared_twin(name))).abs().max() > 1e-3


@every_family
def test_leaves_survive_the_codec_and_clients_are_swapped_without_a_trace(grafted, name):
    model = grafted(name)
    frozen = model.frozen_digest()
    one, other = leaves(model), leaves(model, 0.3)
    again = Bundle.decode(Bundle(trees={"client": one}).encode()).tree("client")
    assert equal(one, again)
    found = []
    for tree in (one, other, again):
        with model.using(tree, chosen(model)):
            found.append(logits(model.base.model))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert model.frozen_digest() == frozen


@every_family
def test_padding_is_left_out_where_a_block_treats_every_token_by_itself(name):
    """Blocks that hold the attention, or read token ids, keep it; elsewhere logits are the same to rounding where they are read.

    What is not read is left out of the last block if it is the last thing but norm and head.
    """
    model = shared_twin(name)
    anatomy = anatomy_of(model)
    tried = Compaction.tried(anatomy, torch.device("cpu"))
    assert tried == Compaction(padding=name not in PADDED, unread=name not in PADDED | READ_ON)
    if name in PADDED:
        return
    mask, seen = torch.ones_like(ids()), []
    mask[0, 5:] = 0
    read = mask.bool() & (torch.arange(mask.shape[1]) > 2)
    with torch.no_grad():
        whole = model(input_ids=ids(), attention_mask=mask, use_cache=False).logits
        blocks = [site.block for site in anatomy.sites]
        with spared(blocks, mask, read if tried.unread else None), watching(anatomy.sites, lambda site, routed: seen.append(routed)):
            compact = model(input_ids=ids(), attention_mask=mask, use_cache=False).logits
        after = model(input_ids=ids(), attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(compact[read], whole[read], **CLOSE)
    last = int(read.sum() if tried.unread else mask.sum())
    assert [len(routed.x) for routed in seen] == [*(int(mask.sum()) for _ in seen[1:]), last]
    assert torch.equal(after, whole)


@every_family
def test_generation_with_a_cache_is_greedy_decoding(grafted, name):
    """Token after token by whole forwards gives what generate gives."""
    model = grafted(name)
    prompt = ids(1, 6)
    with model.using(leaves(model), chosen(model)), torch.no_grad():
        generated = model.base.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        step = prompt
        for _ in range(4):
            step = torch.cat([step, model.base.model(input_ids=step, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert generated.tolist() == step.tolist()


@pytest.mark.parametrize("name", WITHOUT)
def test_what_is_not_supported_has_a_reason_that_holds(name):
    """No causal language model class, or a refusal that says why."""
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with pytest.raises(ValueError, match="Not supported: "):
            anatomy_of(twin(name))
    else:
        assert WITHOUT[name] == "no causal language model in transformers"


@every_family
def test_experts_measured_one_layer_at_a_time_from_disk_are_those_measured_in_memory(name, tmp_path, tiny_tokenizer):
    twin(name).save_pretrained(tmp_path, max_shard_size="60KB")
    tiny_tokenizer.save_pretrained(tmp_path)
    settings = ModelSettings(name=str(tmp_path), device="cpu")
    batches = [Rows(ids(), torch.ones(2, 10)), Rows(ids(1, 7), torch.ones(1, 7))]
    whole = measure(load_base(settings), batches, 25)
    layered = measure_streamed(open_layered(settings), {"client": batches}, 25)["client"]
    assert torch.equal(layered.error_LE, whole.error_LE)
    assert torch.equal(layered.mass_LE, whole.mass_LE)
