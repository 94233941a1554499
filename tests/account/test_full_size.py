"""The arithmetic of full-size models, against published sizes and against figures worked out by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedgraft.account.take import Account, summary
from fedgraft.grafts.graft import GraftedModel
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.methods import apfl, ditto, fedavg, fedex_lora, fedper, ffa_lora, flora, local
from fedgraft.methods.method import Method, settled
from fedgraft.tree import digest
from tests.account.conftest import full_size

Count = Callable[..., Account]
OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 12,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
    },
    "gpt_oss": {"num_local_experts": 8, "intermediate_size": 16, "head_dim": 8},
}
"""Shapes of families whose options differ."""

# Published sizes in billions; MoE layers x experts, top-k; MB (10^6 bytes, bf16) of one full expert per layer with its gate; of its LoRA
# at rank 16 where gate and up are one fused pair; of the attention LoRA q, k, v, o at rank 16; GFLOP per token of selection and of the
# routed forward.
SIZES = {
    "qwen1.5-moe-a2.7b": (14.32, 24, 60, 4, 415, 6.4, 12.6, 24.9, 1.66),
    "olmoe-1b-7b-0924": (6.92, 16, 64, 8, 201, 3.7, 8.4, 12.9, 1.61),
    "mixtral-8x7b": (46.70, 32, 8, 2, 11_275, 52.4, 27.3, 90.2, 22.6),
    "qwen3-30b-a3b": (30.53, 48, 128, 8, 453, 9.8, 26.7, 58.0, 3.62),
    "deepseek-v2-lite": (15.71, 26, 64, 6, 450, 6.9, 14.2, 28.8, 2.70),
    "gpt-oss-20b": (20.91, 24, 32, 4, 1_195, 11.1, 15.9, 38.2, 4.78),
    "deepseek-v3": (671.0, 58, 256, 8, None, None, None, None, None),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str, counted: Count) -> None:
    billions, layers, experts, top_k, full, fused_pairs, attention, selection, routed = SIZES[name]
    account = counted(name, rank=16, targets="q k v o")
    assert account.parameters / 1e9 == pytest.approx(billions, abs=0.006 if billions < 100 else 0.06)
    moe = [layer for layer in account.layers if layer.experts]
    assert sum(len(layer.numbers) for layer in moe) == layers
    assert {(layer.experts.number, layer.experts.top_k) for layer in moe if layer.experts} == {(experts, top_k)}
    if full is None:
        return
    gates = sum(site.inputs_width for site in full_size(name).sites)
    assert round(2 * (account.frozen_graft + gates) / 1e6) == full
    pairs = sum(16 * (2 * site.inputs_width + 3 * site.width) for site in full_size(name).sites)
    assert 2 * pairs / 1e6 == pytest.approx(fused_pairs, abs=0.05)
    third = sum(16 * site.inputs_width for site in full_size(name).sites)  # a pair more has one more A [16, H]
    assert account.personal.places["side"] == pairs + third + gates
    assert account.bytes_up("bf16") / 1e6 == pytest.approx(attention, abs=0.051)
    assert account.compute.selection / 1e9 == pytest.approx(selection, abs=0.05)
    assert account.compute.routed / 1e9 == pytest.approx(routed, abs=0.06 if routed > 10 else 0.005)


def test_the_papers_model(counted: Count) -> None:
    """Qwen1.5-MoE-A2.7B at rank 32: 24 layers, H 2048, I 1408, 60 experts top 4, a shared expert of 5632."""
    name = "qwen1.5-moe-a2.7b"
    account = counted(name)
    assert account.shared.total == 24 * 3 * 2 * 32 * 2048 == 9_437_184
    assert account.bytes_up() == account.bytes_down() == 37_748_736
    assert account.bytes_up("bf16") == 18_874_368
    pairs = 24 * 3 * 32 * (2048 + 1408)
    assert pairs == 7_962_624
    assert account.personal.total == pairs + 24 * 2048  # and the gates
    assert counted(name, method=fedavg.build(), targets="experts").shared.total == 60 * pairs == 477_757_440
    assert pytest.approx(956, abs=0.5) == 2 * 477_757_440 / 1e6
    assert account.parameters / 1e9 == pytest.approx(14.3, abs=0.05)
    assert account.memory.weights / 1e9 == pytest.approx(28.6, abs=0.05)
    assert account.frozen_graft == 24 * 3 * 2048 * 1408 == 207_618_048
    assert account.compute.experts_per_graft == (1408 / 5632, 1408 / 11264) == (0.25, 0.125)
    text = dict(summary(account))
    assert text["travels"] == "9.44 M parameters (attention LoRA), 37.7 MB fp32 each way per client and round (bf16: 18.9 MB)"
    assert text["stays"] == "grafted experts 8.01 M on the client"
    assert "q, k, v; 1 grafted expert in each of 24 layers" in text["trains"]


DENSE = 24 * 3 * 2048 * 2048 * 4
"""Bytes of a residual at q, k and v."""
EACH = "37.7 MB fp32 each way per client and round (bf16: 18.9 MB)"


@pytest.mark.parametrize(
    ("method", "down", "travels", "trains"),
    [
        (
            fedex_lora.build(),
            37_748_736 + DENSE,
            "37.7 MB fp32 up and at most 1.25 GB down per client and round (bf16: 18.9 MB up and at most 623 MB down)",
            None,
        ),
        (
            flora.build(),
            DENSE,
            "37.7 MB fp32 up and at most 1.21 GB down per client and round (bf16: 18.9 MB up and at most 604 MB down)",
            None,
        ),
        (ditto.build(), 37_748_736, EACH, "in 2 passes over the batches of a round"),
        (apfl.build(mix_lr=0.1), 37_748_736, EACH, "in 3 passes over the batches of a round"),
    ],
)
def test_the_screen_counts_residuals_down_and_further_passes(
    counted: Count, method: Method, down: int, travels: str, trains: str | None
) -> None:
    account = counted("qwen1.5-moe-a2.7b", method=method)
    said = dict(summary(account))
    assert said["travels"] == f"9.44 M parameters (attention LoRA), {travels}"
    assert said.get("") == trains
    assert account.bytes_up() == 37_748_736
    assert account.bytes_down() == down


def test_flops_of_a_forward(counted: Count) -> None:
    """Mixtral has few kinds of matrices: the sum is short."""
    compute = counted("mixtral-8x7b", length=1000).compute
    attention = 4096 * (4096 + 1024 + 1024 + 4096)
    assert compute.other == 2 * 32 * (attention + 8 * 4096)
    assert compute.routed == 2 * 32 * 2 * 3 * 4096 * 14336
    assert compute.head == 2 * 32000 * 4096
    assert compute.scores == 32 * 4 * 1000 * 4096
    assert compute.adapters == 2 * 32 * 32 * (3 * 4096 + 4096 + 2 * 1024)
    pairs = 3 * 32 * (4096 + 14336)
    assert compute.graft == 2 * 32 * (3 * 4096 * 14336 + pairs + 4096)
    assert compute.shared == 0
    assert compute.grafted - compute.base == compute.adapters + compute.graft


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_flops_are_those_torch_counts(family: str, counted: Count, tiny_base: Callable[..., Any]) -> None:
    """Torch counts every product of a real forward; in float64 the experts run one by one."""
    base = tiny_base(family, dtype=torch.float64, **OTHERS.get(family, {}))
    base.model.set_attn_implementation("eager")
    length, lora, graft = 16, LoraSettings(rank=4), GraftSettings(form="preserving")
    compute = counted(base, rank=4, length=length, form="preserving").compute
    model, ids = GraftedModel(base, lora, graft), torch.arange(3, 3 + length)[None]
    tree = {key: leaf.double() for key, leaf in (model.fresh_adapters(0) | model.fresh_side([[0]] * len(base.sites), 0)).items()}
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        base.model(input_ids=ids, use_cache=False)
    with torch.no_grad(), FlopCounterMode(display=False) as grafted, model.using(tree, [[0]] * len(base.sites)):
        base.model(input_ids=ids, use_cache=False)
    assert plain.get_total_flops() == pytest.approx(length * compute.base, rel=0.0001)
    added = grafted.get_total_flops() - plain.get_total_flops()
    assert added == length * (compute.adapters + compute.graft)


def test_sliding_windows_bound_the_scores(counted: Count) -> None:
    scores = counted("gpt-oss-20b", length=1000).compute.scores
    assert scores == 12 * 4 * 4096 * (128 + 1000)


def test_the_preserving_form_runs_two_experts_and_several_grafts_add_up(counted: Count) -> None:
    one, both = (counted("olmoe-1b-7b-0924", form=form) for form in ("faithful", "preserving"))
    assert both.compute.graft - one.compute.graft == 2 * one.frozen_graft
    two = counted("olmoe-1b-7b-0924", per_layer=2)
    assert two.compute.graft == 2 * one.compute.graft
    assert two.personal.total == 2 * one.personal.total


def test_in_place_runs_two_experts_on_the_tokens_that_are_routed_to_its_source(counted: Count) -> None:
    """8 of 64 experts a token; there is no gate of d numbers a layer, as without one."""
    both, in_place = (counted("olmoe-1b-7b-0924", form=form, gate="off") for form in ("preserving", "in_place"))
    assert in_place.compute.graft == both.compute.graft * 8 / 64
    assert counted("olmoe-1b-7b-0924").personal.total - both.personal.total == 16 * 2048
    assert in_place.personal.total == both.personal.total


def test_a_fully_trained_graft_holds_its_matrices(counted: Count) -> None:
    account = counted("olmoe-1b-7b-0924", train="full", gate_start="low")
    assert account.personal.total == 16 * (3 * 2048 * 1024 + 2048 + 1)


def test_what_is_shared_follows_the_method(counted: Count) -> None:
    name = "deepseek-v2-lite"
    assert counted(name, method=fedavg.build()).personal.total == 0
    alone = counted(name, method=local.build())
    assert alone.shared.total == 0
    assert dict(summary(alone))["travels"] == "nothing"
    dense = next(layer for layer in counted(name).layers if layer.experts is None)
    assert (dense.numbers, dense.personal, dense.shared) == ((0,), 0, 32 * (2048 + 3072 + 2048 + 576 + 512 + 4096))


def test_second_adapters_count_and_frozen_factors_do_not(counted: Count) -> None:
    """q, k and v of Mixtral: A is rank x 4096 each, B rank x (4096 + 1024 + 1024), in 32 layers."""
    name, factors = "mixtral-8x7b", (32 * 32 * 3 * 4096, 32 * 32 * 6144)
    twice = counted(name, method=ditto.build())
    assert twice.shared.total == twice.personal.total == sum(factors)
    assert twice.personal.places == {"own": sum(factors)}
    only_b = counted(name, method=ffa_lora.build())
    assert (only_b.shared.total, only_b.personal.total) == (factors[1], 0)
    last = settled(fedper.build(layers=8), full_size(name), LoraSettings(), [])
    assert counted(name, method=last).personal.layers == dict.fromkeys(range(24, 32), sum(factors) // 32)


def test_patterns_that_match_nothing_are_refused(counted: Count) -> None:
    with pytest.raises(ValueError, match="no 'mixer' layer that can be adapted; it has k, linear, o, q, v"):
        counted("mixtral-8x7b", targets="q mixer")
    with pytest.raises(ValueError, match=re.escape("of the leaves this method trains (attention) none would stay")):
        counted("mixtral-8x7b", method=Method(personal=lambda address: "lora" in address))
    with pytest.raises(ValueError, match="none would travel"):
        counted("mixtral-8x7b", method=Method(personal=lambda address: "q" in address), targets="q")
    with pytest.raises(ValueError, match="trains nothing in this model: it has leaves at no place"):
        counted("mixtral-8x7b", method=Method(places=frozenset()))


def test_the_account_is_that_of_the_leaves_a_run_has(counted: Count, tiny_base: Callable[..., object]) -> None:
    base = tiny_base("qwen2_moe")
    account = counted(base, rank=4)
    model = GraftedModel(base, LoraSettings(rank=4), GraftSettings())  # type: ignore[arg-type]
    adapters, side = model.fresh_adapters(0), model.fresh_side([[0], [1]], 0)
    assert digest(adapters) != digest(side)
    assert account.shared.total == sum(leaf.numel() for leaf in adapters.values())
    assert account.personal.total == sum(leaf.numel() for leaf in side.values())
