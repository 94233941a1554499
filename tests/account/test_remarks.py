"""What is said aloud of layers that are not plain attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedgraft.account.remarks import remarks
from fedgraft.account.take import Account
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.methods.flex import build
from fedgraft.moe.family import Anatomy, anatomy_of
from tests.account.conftest import full_size

SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 128}


def of_family(name: str, **options: Any) -> Anatomy:
    with torch.device("meta"):
        return anatomy_of(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL | options)))


@pytest.fixture
def said(counted: Callable[..., Account]) -> Callable[..., list[str]]:
    def say(anatomy: Anatomy, targets: str = "q k v", **graft: Any) -> list[str]:
        lora, settings = LoraSettings(targets=tuple(targets.split())), GraftSettings(**graft)  # type: ignore[arg-type]
        layers = counted(anatomy, targets=targets, **graft).layers
        found = remarks(anatomy, layers, build(), lora, settings)
        return [f"{one.severity}: {one.text}" + (f"; {one.remedy}" if one.remedy else "") for one in found]

    return say


def test_plain_attention_needs_no_words(said: Callable[..., list[str]]) -> None:
    assert said(full_size("mixtral-8x7b")) == []


def test_a_router_is_no_linear_layer_that_is_missed(said: Callable[..., list[str]]) -> None:
    assert said(of_family("phimoe")) == []


def test_latent_attention(said: Callable[..., list[str]]) -> None:
    assert said(full_size("deepseek-v3")) == [
        "note: layers 0-60: k and v come from the same projections (kv_a, kv_b), adapted once either is named",
        "note: layers 0-60: q is low-rank itself (q_a, q_b); each factor has its own pair",
        "note: layers 0-2: no routed experts, so nothing is grafted there",
    ]


def test_linear_attention_is_left_out_aloud(said: Callable[..., list[str]]) -> None:
    anatomy = of_family("qwen3_next")
    (text,) = said(anatomy)
    assert text == (
        "note: layers 0-2: linear attention, state space or convolution (in_qkvz, in_ba, out) is not adapted by lora.targets q, k, v; "
        "add mixer to lora.targets to adapt it"
    )
    assert said(anatomy, "q mixer") == [
        "note: layers 0-2: linear attention, state space or convolution (in_qkvz, in_ba, out) is adapted too"
    ]


def test_fused_projections(said: Callable[..., list[str]]) -> None:
    anatomy = of_family("minimax", layer_types=["full_attention", "linear_attention"] * 2)
    assert "note: layers 1, 3: q, k and v are one fused projection (qkv), adapted as a whole" in said(anatomy)


def test_grouped_maps(said: Callable[..., list[str]]) -> None:
    texts = said(of_family("deepseek_v4"))
    assert "note: layers 0-3: self_attn.o_a_proj (DeepseekV4GroupedLinear) is no plain linear map and cannot be adapted" in texts


def test_routers_without_rows_and_too_many_grafts_are_errors(said: Callable[..., list[str]]) -> None:
    zaya = of_family("zaya")
    assert any(text.startswith("error: ") and text.endswith("set graft.gate_start: low") for text in said(zaya))
    assert not any(text.startswith("error") for text in said(zaya, gate_start="low"))
    assert said(full_size("mixtral-8x7b"), per_layer=9)[0].startswith("error: graft.per_layer 9: there are only 8 experts")
