"""LoRA on the attention projections, through PEFT, with the factors kept outside the model as leaves of a tree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedgraft import address, seeds
from fedgraft.moe.load import Base
from fedgraft.settings import Section
from fedgraft.tree import Tree

ADAPTER = "fedgraft"


class LoraSettings(Section):
    """Low-rank adapters (Hu et al. 2021): W x + (alpha / rank) B A x, A [rank, in] random, B [out, rank] zero at the start."""

    rank: int = Field(default=32, ge=1)
    """Rank of every pair."""
    alpha: float = Field(default=64.0, gt=0)
    """Scale; the product is multiplied by alpha / rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the input of A while training."""
    targets: tuple[Literal["q", "k", "v", "o"], ...] = ("q", "k", "v")
    """Attention projections by role."""


@dataclass(frozen=True)
class Slot:
    """Where one pair of factors is put while a tree is in use."""

    key_a: str
    key_b: str
    module: Any


class AttentionLora:
    """PEFT's LoRA layers around the attention projections of every MoE layer, empty until leaves are put in."""

    def __init__(self, base: Base, settings: LoraSettings) -> None:
        """Inject the layers.

        Raises:
            ValueError: a projection named in `lora.targets` does not exist in the model.
        """
        from peft import LoraConfig, inject_adapter_in_model

        self.settings = settings
        places = {}
        for site in base.sites:
            for role in settings.targets:
                if role not in site.attention:
                    raise ValueError(f"lora.targets: layer {site.layer} has no {role!r} projection; it has {sorted(site.attention)}")
                places[site.attention[role]] = (site.layer, role)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides it by r and takes fractions
            lora_dropout=settings.dropout,
            target_modules=list(places),
        )
        inject_adapter_in_model(config, base.model, ADAPTER, low_cpu_mem_usage=True)
        base.model.eval()  # the injected dropout starts in train mode
        self.slots = []
        for path, (layer, role) in places.items():
            module = base.model.get_submodule(path)
            self.slots.append(Slot(address.attention(layer, role, "A"), address.attention(layer, role, "B"), module))
        self.put({})

    def put(self, tree: Mapping[str, Tensor]) -> set[str]:
        """Use the factors of `tree` and return their addresses; a pair that it lacks is switched off. Pointer work, nothing is copied."""
        used = set()
        for slot in self.slots:
            factor_a = tree.get(slot.key_a)
            slot.module._disable_adapters = factor_a is None
            if factor_a is not None:
                slot.module.lora_A[ADAPTER]._parameters["weight"] = factor_a
                slot.module.lora_B[ADAPTER]._parameters["weight"] = tree[slot.key_b]
                used |= {slot.key_a, slot.key_b}
        return used

    def fresh(self, seed: int) -> Tree:
        """New factors: A uniform as in PEFT (Kaiming with a = sqrt(5)), B zero; a function of seed and address alone."""
        tree: Tree = {}
        for slot in self.slots:
            linear = slot.module.base_layer
            tree |= fresh_pair(slot.key_a, slot.key_b, self.settings.rank, linear.in_features, linear.out_features, seed)
        return tree


def fresh_pair(key_a: str, key_b: str, rank: int, inputs: int, outputs: int, seed: int) -> Tree:
    """A [rank, inputs] ~ U(-1/sqrt(inputs), 1/sqrt(inputs)), B [outputs, rank] = 0, both fp32."""
    bound = 1 / math.sqrt(inputs)
    draw = torch.rand(rank, inputs, generator=seeds.torch_rng(seed, "leaf", key_a))
    return {key_a: (2 * draw - 1) * bound, key_b: torch.zeros(outputs, rank)}
