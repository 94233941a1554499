"""Extraction against the block's own path (an expert run through the experts module with weight 1), and where things lie."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedgraft.moe.expert import fused_expert, gated
from fedgraft.moe.family import family_of, general_sites
from tests.conftest import PROVEN

H, E = 32, 8
OTHERS = {  # transposed, interleaved, biased and clamped; shared experts and a dense first layer; no shared expert
    "gpt_oss": {"num_local_experts": E, "intermediate_size": 16, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": E,
        "moe_intermediate_size": 16,
        "intermediate_size": 32,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "qwen3_moe": {"num_experts": E, "moe_intermediate_size": 16, "intermediate_size": 32, "head_dim": 8},
}


def own_path(experts: nn.Module, x: torch.Tensor, index: int) -> torch.Tensor:
    """The block's output for x when every token goes to one expert with weight 1."""
    one = torch.ones(len(x), 1, dtype=x.dtype)
    return experts(x, torch.full_like(one, index, dtype=torch.long), one)


@pytest.mark.parametrize("dispatch", ["eager", "grouped_mm"])
@pytest.mark.parametrize("family", [*PROVEN, *OTHERS])
def test_extracted_expert_is_the_blocks_own(tiny_base, family, dispatch):
    base = tiny_base(family, **OTHERS.get(family, {}))
    base.model.set_experts_implementation(dispatch)
    x = torch.randn(24, H)
    for site in base.sites:
        assert site.num_experts == E
        for index in range(E):
            with torch.no_grad():
                own = own_path(site.experts, x, index)
            extracted = base.family.expert(site, index)(x)
            assert own.abs().mean() > 0.05  # there is something to compare
            torch.testing.assert_close(extracted, own, rtol=1e-5, atol=1e-5)


CLAMP = 7.0  # of gpt-oss; the attribute that holds it differs between transformers versions


def test_clamped_activation_is_the_blocks_own(tiny_base):
    base = tiny_base("gpt_oss", **OTHERS["gpt_oss"])
    x = 100 * torch.randn(24, H)  # far beyond the clamp
    expert = base.family.expert(base.sites[0], 3)
    assert expert.project(x)[0].abs().max() > CLAMP
    with torch.no_grad():
        torch.testing.assert_close(expert(x), own_path(base.sites[0].experts, x, 3), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", [*PROVEN, *OTHERS])
def test_projections_alone_rebuild_the_expert(tiny_base, family):
    """Gate, up and down applied one by one equal the fused path (biases through the same split)."""
    base = tiny_base(family, **OTHERS.get(family, {}))
    expert, x = base.family.expert(base.sites[-1], 5), torch.randn(24, H)
    parts = expert.projections()
    assert {name: tuple(weight.shape) for name, weight in parts.items()} == {"gate": (16, H), "up": (16, H), "down": (H, 16)}
    linear = torch.nn.functional.linear
    hidden = expert.activate(linear(x, parts["gate"], expert.gate_bias), linear(x, parts["up"], expert.up_bias))
    torch.testing.assert_close(linear(hidden, parts["down"], expert.down_bias), expert(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*PROVEN, *OTHERS])
def test_projections_are_views_of_the_fused_parameters(tiny_base, family):
    base = tiny_base(family, **OTHERS.get(family, {}))
    site = base.sites[0]
    expert = base.family.expert(site, 2)
    storages = {part.untyped_storage().data_ptr() for part in expert.projections().values()}
    assert storages == {site.experts.gate_up_proj.untyped_storage().data_ptr(), site.experts.down_proj.untyped_storage().data_ptr()}
    before = {name: weight.clone() for name, weight in expert.projections().items()}
    with torch.no_grad():
        site.experts.gate_up_proj[2] += 1
        site.experts.down_proj[2] += 1
    assert all(torch.equal(weight, before[name] + 1) for name, weight in expert.projections().items())


@pytest.mark.parametrize("family", PROVEN)
def test_sites_name_layers_and_modules(tiny_base, family):
    base = tiny_base(family)
    assert [site.layer for site in base.sites] == [0, 1]
    for site in base.sites:
        assert base.model.get_submodule(site.path) is site.experts
        prefix = f"model.layers.{site.layer}.self_attn"
        attention = {part.name: part.path for part in base.projections if (part.layer, part.place) == (site.layer, "attention")}
        assert attention == {role: f"{prefix}.{role}_proj" for role in "qkvo"}
        assert len(site.shared) == (family == "qwen2_moe")
        assert (site.num_experts, site.width, site.inputs_width, site.top_k) == (E, 16, H, 2)


def test_dense_layers_keep_their_number(tiny_base):
    assert [site.layer for site in tiny_base("qwen2_moe", num_hidden_layers=3, mlp_only_layers=[1]).sites] == [0, 2]


@pytest.mark.parametrize("family", PROVEN)
def test_router_row_and_scores_are_what_the_router_uses(tiny_base, family):
    base = tiny_base(family)
    site, x = base.sites[1], torch.randn(24, H)
    with torch.no_grad():
        logits, weights, chosen = site.router(x)
        scores = base.family.scores(site, x, chosen, weights)
    torch.testing.assert_close(base.family.router_row(site, 6) @ x.T, logits[:, 6])
    torch.testing.assert_close(scores, logits.softmax(-1))
    assert torch.equal(scores.topk(2).indices, chosen)


def test_scores_include_the_routers_bias(tiny_base):
    base = tiny_base("gpt_oss", **OTHERS["gpt_oss"])
    site, x = base.sites[0], torch.randn(24, H)
    site.router.bias.data[4] = 50.0
    with torch.no_grad():
        _, weights, chosen = site.router(x)
        assert torch.equal(base.family.scores(site, x, chosen, weights).argmax(-1), torch.full((24,), 4))


def test_ungated_experts_activate_the_up_projection():
    fused, down, x = torch.randn(5, 3), torch.randn(3, 5), torch.randn(2, 3)
    expert = fused_expert(fused, down, gated(torch.relu), has_gate=False)
    assert expert.projections().keys() == {"up", "down"}
    torch.testing.assert_close(expert(x), torch.relu(x @ fused.T) @ down.T)


def test_frozen_and_probed(tiny_base):
    base = tiny_base("olmoe")
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training


def test_dense_model_is_refused():
    with pytest.raises(ValueError, match="no MoE layers"):
        general_sites(nn.Sequential(nn.Linear(2, 2)))


def test_experts_without_router_are_refused(tiny_base):
    base = tiny_base("olmoe")
    del base.model.model.layers[1].mlp.gate
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts: found experts but no router"):
        general_sites(base.model)


def test_normed_experts_are_refused(tiny_base):
    base = tiny_base("olmoe")
    base.sites[1].experts.has_post_expert_norm = True
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: experts with a norm"):
        general_sites(base.model)


def test_unknown_model_type_follows_the_general_rule():
    assert family_of("no_such_architecture").sites is general_sites
