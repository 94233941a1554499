"""LoRA on linear layers of the base, through PEFT, with the factors kept outside the model as leaves of a tree; and on single experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedgraft import address, seeds
from fedgraft.moe.expert import Expert
from fedgraft.moe.family import Anatomy
from fedgraft.moe.projections import Projection
from fedgraft.settings import Section
from fedgraft.tree import Tree

ADAPTER = "fedgraft"
Target: TypeAlias = Literal["q", "k", "v", "o", "mixer", "shared", "linear", "router", "experts"]
Shapes: TypeAlias = dict[str, tuple[int, ...]]
"""Leaf address -> shape."""


class LoraSettings(Section):
    """Low-rank adapters (Hu et al. 2021): W x + (alpha / rank) B A x, A [rank, in] random, B [out, rank] zero at the start."""

    rank: int = Field(default=32, ge=1)
    """Rank of every pair."""
    alpha: float = Field(default=64.0, gt=0)
    """Scale; the product is multiplied by alpha / rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the input of A while training."""
    targets: tuple[Target, ...] = Field(default=("q", "k", "v"), min_length=1)
    """What is adapted in every decoder layer. Attention projections by role, whatever the model calls them: `q`, `k`, `v`, `o` (one
    that serves several roles, as in fused or low-rank attention, is adapted once any of them is named). `mixer`: state-space, linear
    attention and convolution layers; `shared`: shared experts; `linear`: all linear layers but router and head. `router`: its
    rows, trained in full; `experts`: every routed expert."""


class LowRank:
    """PEFT's LoRA layers around the chosen linear layers, empty until leaves are put in."""

    def __init__(self, anatomy: Anatomy, settings: LoraSettings) -> None:
        """Inject the layers.

        Raises:
            ValueError: a name in `lora.targets` matches nothing in the model.
        """
        from peft import LoraConfig, inject_adapter_in_model

        chosen = chosen_projections(anatomy, settings.targets)
        self.slots: list[tuple[str, Any]] = []
        if not chosen:
            return
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides it by r and takes fractions
            lora_dropout=settings.dropout,
            target_modules=[projection.path for projection in chosen],
        )
        inject_adapter_in_model(config, anatomy.model, ADAPTER, low_cpu_mem_usage=True)
        anatomy.model.eval()  # the injected dropout starts in train mode
        self.slots = [(_head(projection), anatomy.model.get_submodule(projection.path)) for projection in chosen]
        self.put({})

    def put(self, tree: Mapping[str, Tensor]) -> set[str]:
        """Use the factors of `tree` and return their addresses; a pair that it lacks is switched off. Pointer work, nothing is copied."""
        used = set()
        for head, module in self.slots:
            factor_a = tree.get(f"{head}.A")
            module._disable_adapters = factor_a is None
            if factor_a is not None:
                module.lora_A[ADAPTER]._parameters["weight"] = factor_a
                module.lora_B[ADAPTER]._parameters["weight"] = tree[f"{head}.B"]
                used |= {f"{head}.A", f"{head}.B"}
        return used


def chosen_projections(anatomy: Anatomy, targets: Sequence[Target]) -> list[Projection]:
    """The linear layers that `targets` name, in the order of the model.

    Raises:
        ValueError: one of the names matches nothing; names what there is.
    """
    linear = set(targets) - {"router", "experts"}
    tags = {projection.path: {*projection.roles, projection.place, "linear"} for projection in anatomy.projections}
    known = set().union(*tags.values())
    for missing in sorted(linear - known):
        there = ", ".join(sorted(known - {"attention"}))
        raise ValueError(f"lora.targets: this model has no {missing!r} layer that can be adapted; it has {there}")
    return [projection for projection in anatomy.projections if tags[projection.path] & linear]


def low_rank_shapes(anatomy: Anatomy, settings: LoraSettings) -> Shapes:
    """Shapes of the pairs on the chosen linear layers.

    Raises:
        ValueError: as `chosen_projections`.
    """
    shapes: Shapes = {}
    for projection in chosen_projections(anatomy, settings.targets):
        shapes |= pair_shapes(_head(projection), settings.rank, projection.inputs, projection.outputs)
    return shapes


def pair_shapes(head: str, rank: int, inputs: int, outputs: int) -> Shapes:
    """A [rank, inputs] and B [outputs, rank] under one head."""
    return {f"{head}.A": (rank, inputs), f"{head}.B": (outputs, rank)}


def fresh_pairs(shapes: Shapes, seed: int) -> Tree:
    """New factors, fp32: A ~ U(-1/sqrt(in), 1/sqrt(in)) as in PEFT (Kaiming with a = sqrt(5)), B = 0; each from seed and address."""
    tree: Tree = {}
    for key, shape in shapes.items():
        if key.endswith(".A"):
            bound = 1 / math.sqrt(shape[1])
            tree[key] = (2 * torch.rand(*shape, generator=seeds.torch_rng(seed, "leaf", key)) - 1) * bound
        else:
            tree[key] = torch.zeros(*shape)
    return tree


@dataclass(frozen=True)
class Pairs:
    """The low-rank pairs of one expert in use, and how they are applied."""

    leaves: Mapping[str, Tensor]
    """`gate.A`, `gate.B`, `up.A`, ..."""
    settings: LoraSettings

    def run(self, source: Expert, x: Tensor, training: bool) -> Tensor:
        """Output [T, H] of an expert whose projections carry low-rank terms, for x [T, H]."""
        gate, up = source.project(x)
        dropped = F.dropout(x, self.settings.dropout, training)
        if gate is not None:
            gate = gate + self._term("gate", dropped).to(gate.dtype)
        up = up + self._term("up", dropped).to(up.dtype)
        hidden = source.activate(gate, up)
        down = F.linear(hidden, source.down, source.down_bias)
        return down + self._term("down", F.dropout(hidden, self.settings.dropout, training)).to(down.dtype)

    def _term(self, name: str, x: Tensor) -> Tensor:
        factor_a, factor_b = self.leaves[f"{name}.A"], self.leaves[f"{name}.B"]
        scale = self.settings.alpha / factor_a.shape[0]
        return F.linear(F.linear(x.to(factor_a.dtype), factor_a), factor_b) * scale


def _head(projection: Projection) -> str:
    return address.projection(projection.layer, projection.place, projection.name)
