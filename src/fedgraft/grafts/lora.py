"""LoRA on linear layers of the base and on single experts, with the factors kept outside the model as leaves of a tree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

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
    init: str | None = None
    """Start from leaves that are there already, in the place of new ones: the folder of a PEFT adapter, of what `fedgraft export
    --as fedgraft` wrote, or of a run, of which the shared leaves are taken. They compute what they computed there, whatever `alpha` is
    here; `rank` and `targets` must be theirs."""


Pair: TypeAlias = tuple[Tensor, Tensor]
"""A [rank, in] and B [out, rank]."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is added to the output of one linear layer."""

    pairs: dict[str, Pair]
    """Low-rank pairs by head: the layer's first one, its second one, or both."""
    shares: dict[str, Tensor]
    """Factors of the pairs that have one, [] or one for each row of the batch [B]."""
    residual: tuple[Tensor, ...]
    """Linear maps one after another, frozen: (), (dense,) or (A, B)."""

    def add(self, output: Tensor, inputs: Tensor, settings: LoraSettings, training: bool) -> Tensor:
        """Output [..., out] of the layer for inputs [..., in] with all terms; pairs see the same dropout, a residual none."""
        total = output
        if self.pairs:
            x = F.dropout(inputs.to(next(iter(self.pairs.values()))[0].dtype), settings.dropout, training)
            for head, pair in self.pairs.items():
                term = low_rank_term(x, *pair, settings.alpha)
                total = total + (_scaled(term, self.shares[head].to(term.device)) if head in self.shares else term)
        if self.residual:
            x = inputs.to(self.residual[0].dtype)
            for factor in self.residual:
                x = F.linear(x, factor)
            total = total + x
        return total.to(output.dtype)


class Added(Protocol):
    """Something that is added to the output of one linear layer: a client's terms, or those of several for rows of their own."""

    def add(self, output: Tensor, inputs: Tensor, settings: LoraSettings, training: bool) -> Tensor:
        """Output [..., out] of the layer for inputs [..., in] with all that is added."""


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
        self._active: dict[str, Added] = {}
        for head, path in paths.items():
            anatomy.model.get_submodule(path).register_forward_hook(self._hook(head))

    def put(self, tree: Mapping[str, Tensor]) -> set[str]:
        """Use the factors of `tree` and return their addresses; a pair that it lacks is switched off. Pointer work, nothing is copied."""
        self._active, used, mix = dict[str, Added](), set[str](), tree.get(address.MIX)
        for head in self.heads:
            second, residual = address.own(head), f"{head}.residual"
            pairs = {place: pair for place in (head, second) if (pair := _factors(tree, place))}
            frozen = (tree[residual],) if residual in tree else _factors(tree, residual)
            if pairs or frozen:
                shares = {} if mix is None else {head: 1 - mix, second: mix}
                self._active[head] = Terms(pairs=pairs, shares=shares, residual=frozen)
                used |= {f"{place}.{part}" for place in pairs for part in "AB"} | {address.MIX}
                used |= {residual, f"{residual}.A", f"{residual}.B"}
        return used & tree.keys()

    def _hook(self, head: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            terms = self._active.get(head)
            return None if terms is None else terms.add(output, args[0], self.settings, module.training)

        return hook


def _scaled(term: Tensor, share: Tensor) -> Tensor:
    """The term times its share; its first dimension is the rows or, where a layer sees all tokens in one list, rows x tokens."""
    return term * share if share.dim() == 0 else (term.reshape(len(share), -1) * share[:, None]).reshape(term.shape)


def _factors(tree: Mapping[str, Tensor], head: str) -> Pair | tuple[()]:
    """The pair under a head; nothing unless both factors are there."""
    both = f"{head}.A", f"{head}.B"
    return (tree[both[0]], tree[both[1]]) if tree.keys() >= set(both) else ()


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
