"""Quantised bases: experts that really are int8, packed checkpoints unpacked exactly or refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedgraft.grafts.graft import GraftedModel
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.moe.load import Base, load_base
from fedgraft.moe.plan import examine
from fedgraft.moe.quantise import expert_parameters
from fedgraft.moe.settings import ModelSettings
from fedgraft.moe.weights import plain
from tests.moe.conftest import merged, rewrite, store

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Values of the 16 codes of e2m1, from the OCP microscaling specification."""
IDS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(3))
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao (extra quant) is not installed")


def load(folder: Path, **options: Any) -> Base:
    return load_base(ModelSettings(name=str(folder), device="cpu", **options))


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        load(folder, **options)
    return str(refused.value)


def pack_mxfp4(folder: Path) -> dict[str, Tensor]:
    """Replace the experts of a gpt_oss folder by random MXFP4 blocks; returns what they stand for, as the model keeps it [E, in, out]."""
    values, packed = {}, {}
    for name, tensor in merged(folder).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 126, (experts, outputs, inputs // 32), dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()  # low half first
        values[name] = (FP4[codes] * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).mT
    store(folder, packed)
    rewrite(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return values


@pytest.fixture
def mxfp4(saved: Callable[..., tuple[Path, Any]]) -> tuple[Path, dict[str, Tensor]]:
    folder, _ = saved("gpt_oss", num_local_experts=4, intermediate_size=32, head_dim=8)
    return folder, pack_mxfp4(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mxfp4_is_unpacked_exactly(mxfp4, dtype):
    """Four-bit values times powers of two are exact in bfloat16."""
    folder, values = mxfp4
    base = load(folder, dtype=dtype)
    for site in base.sites:
        expert = base.family.expert(site, 2)
        assert expert.gate is not None
        assert expert.gate.dtype == getattr(torch, dtype)
        rows = values[f"{site.path}.gate_up_proj"][2].mT  # gate and up rows in turns
        assert torch.equal(expert.gate.float(), rows[::2])
        assert torch.equal(expert.up.float(), rows[1::2])
        assert torch.equal(expert.down.float(), values[f"{site.path}.down_proj"][2].mT)
    assert f"packed weights (mxfp4) are unpacked to {dtype}" in base.notes


def test_mxfp4_needs_the_unpacked_size(mxfp4):
    folder, _ = mxfp4
    needed = examine(ModelSettings(name=str(folder), device="cpu", dtype="bfloat16")).needed
    assert needed.weights == sum(2 * part.numel() for part in load(folder, dtype="bfloat16").model.parameters())
    packed = sum(tensor.numel() for tensor in merged(folder).values() if tensor.dtype == torch.uint8)
    assert needed.experts == pytest.approx(packed * 2 / (1 / 2 + 1 / 32))  # half a byte a value and a byte for 32 of them


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "compressed-tensors", "bitsandbytes", "torchao", "new-one"])
def test_other_packed_checkpoints_are_refused_with_what_can_be_done(broken, method):
    rewrite(broken, quantization_config={"quant_method": method, "load_in_4bit": method == "bitsandbytes"})
    words = refusal(broken)
    assert f"its weights are quantised ({method}), and a graft is cut from plain weights; only mxfp4 is unpacked while loading" in words
    assert "give the unquantised checkpoint of the model" in words


def test_packed_weights_that_config_json_hides_are_refused(broken):
    tensors = merged(broken)
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    store(broken, tensors | {name: tensors[name].to(torch.float8_e4m3fn)})
    assert f"{name} is stored as F8_E4M3, and config.json does not say how it is quantised" in refusal(broken)


def test_bitsandbytes_is_refused_with_the_memory_it_would_really_need(broken):
    words = refusal(broken, quantise="bitsandbytes")
    assert "packs ordinary linear layers only, so the fused experts, " in words
    assert words.endswith("would stay as they are; use quantise: int8 with experts: eager")


def test_int8_without_torchao_says_what_to_install(broken, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs torchao; pip install 'fedgraft[quant]'" in refusal(broken, quantise="int8", experts="eager")


@needs_torchao
def test_int8_is_refused_for_transposed_experts(mxfp4):
    assert "(GptOssExperts) keeps its weights transposed or in a form of its own" in refusal(mxfp4[0], quantise="int8", experts="eager")


def quantised_bytes(parameter: Any) -> int:
    return sum(part.numel() * part.element_size() for part in (parameter.qdata, parameter.scale))


@needs_torchao
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "mixtral"])
def test_int8_experts_take_the_memory_that_was_announced(saved, family):
    folder, model = saved(family)
    settings = ModelSettings(name=str(folder), device="cpu", quantise="int8", experts="eager")
    base, plan = load_base(settings), examine(settings)
    experts = expert_parameters(base.sites)
    assert {parameter.qdata.dtype for parameter in experts.values()} == {torch.int8}
    assert sum(quantised_bytes(parameter) for parameter in experts.values()) == plan.needed.experts
    assert plan.needed.experts < 0.4 * sum(4 * parameter.numel() for parameter in experts.values())
    for name, parameter in base.model.named_parameters():
        exact = model.get_parameter(name)
        if name in experts:  # rounded to 127 steps of the row's largest value
            bound = exact.abs().amax(-1, keepdim=True) / 127 / 2
            assert bool(((plain(parameter) - exact).abs() <= bound * 1.01).all())
        else:
            assert torch.equal(parameter, exact)


@needs_torchao
def test_a_graft_is_cut_from_the_dequantised_expert_and_trains(saved):
    folder, _ = saved("olmoe")
    base = load(folder, quantise="int8", experts="eager")
    site, x = base.sites[1], torch.randn(7, 32)
    expert = base.family.expert(site, 3)
    alone = site.experts(x, torch.full((7, 1), 3), torch.ones(7, 1))
    torch.testing.assert_close(expert(x), alone, rtol=1e-5, atol=1e-5)
    assert expert.gate is not None
    assert torch.equal(torch.cat([expert.gate, expert.up]), plain(site.experts.gate_up_proj)[3])

    model = GraftedModel(base, LoraSettings(rank=2, dropout=0), GraftSettings())
    before, experts = model.frozen_digest(), [[3], [5]]
    tree = {key: leaf.requires_grad_() for key, leaf in (model.fresh_side(experts, 1) | model.fresh_adapters(1)).items()}
    optimizer = torch.optim.SGD(tree.values(), lr=0.5)
    losses = []
    for _ in range(3):
        with model.using(tree, experts):
            loss = nn.functional.cross_entropy(base.model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(leaf.grad is not None and bool(leaf.grad.abs().sum() > 0) for leaf in tree.values())
    assert model.frozen_digest() == before


def test_config_of_a_packed_checkpoint_is_left_as_it_is(mxfp4):
    folder, _ = mxfp4
    load(folder)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
