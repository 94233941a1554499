"""LoRA on linear layers of the base and on single experts, with the factors kept outside the model as leaves of a tree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fedgraft import address, seeds
from fedgraft.moe.expert import Expert
from fedgraft.moe.family import Anatomy
from fedgraft.moe.projections import Projection
from fedgraft.settings import Section
from fedgraft.tree import Tree

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
    """Low-rank terms on the chosen linear layers, added where their outputs leave; without leaves in use the layers run untouched.

    The modules stay what they are and keep their names, whatever they are called and however their weights are stored.
    """

    def __init__(self, anatomy: Anatomy, settings: LoraSettings) -> None:
        """Register the hooks.

        Raises:
            ValueError: a name in `lora.targets` matches nothing in the model.
        """
        self.settings = settings
        paths = {_head(projection): projection.path for projection in chosen_projections(anatomy, settings.targets)}
        self.heads = list(paths)
        self._active: dict[str, tuple[Tensor, Tensor]] = {}
        for head, path in paths.items():
            anatomy.model.get_submodule(path).register_forward_hook(self._hook(head))

    def put(self, tree: Mapping[str, Tensor]) -> set[str]:
        """Use the factors of `tree` and return their addresses; a pair that it lacks is switched off. Pointer work, nothing is copied."""
        self._active = {head: (tree[f"{head}.A"], tree[f"{head}.B"]) for head in self.heads if f"{head}.A" in tree}
        return {f"{head}.{part}" for head in self._active for part in "AB"}

    def _hook(self, head: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            pair = self._active.get(head)
            if pair is None:
                return None
            x = F.dropout(args[0].to(pair[0].dtype), self.settings.dropout, module.training)
            return (output + low_rank_term(x, *pair, self.settings.alpha)).to(output.dtype)

        return hook


def low_rank_term(x: Tensor, factor_a: Tensor, factor_b: Tensor, alpha: float) -> Tensor:
    """(alpha / rank) B A x for x [..., in], A [rank, in] and B [out, rank]."""
    return F.linear(F.linear(x.to(factor_a.dtype), factor_a), factor_b) * (alpha / factor_a.shape[0])


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
        return low_rank_term(x, self.leaves[f"{name}.A"], self.leaves[f"{name}.B"], self.settings.alpha)


def _head(projection: Projection) -> str:
    return address.projection(projection.layer, projection.place, projection.name)
