"""The graft of FLEx: whole experts beside the frozen ones, each behind its own learned gate (arXiv 2506.00965).

Faithful form: y = R(x) + sum_j sigmoid(g_j . x) E_gj(x), added where the routed experts' output leaves their module.
Output-preserving form: E_gj(x) - E_ej(x) in place of E_gj(x), which is the base model at step 0. In place: the router's own weight of e_j
for the token (zero where e_j is not among its top k) in place of the gate, in the preserving form, so that e_j itself is what changes:
sum_i w_i E_i(x) + w_ej (E_gj(x) - E_ej(x)). The frozen weights of a graft alias its source expert; only the leaves are new memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from fedgraft import address
from fedgraft.grafts.lora import LoraSettings, Pairs, Shapes, fresh_pairs, pair_shapes
from fedgraft.moe.expert import Expert, Projected
from fedgraft.moe.family import Anatomy
from fedgraft.moe.site import Arguments, Site, add_to_output
from fedgraft.moe.weights import compute_device
from fedgraft.settings import Section
from fedgraft.tree import Tree

LOW_BIAS = -2.0
SeeGate: TypeAlias = Callable[[int, int, Tensor], None]
"""Called with layer, number of the graft in it and its weight [T] for every token: sigmoid(g.x), 1 without a gate, in place the router's.

T = batch x length tokens, padding included."""
Seen: TypeAlias = tuple[Tensor, tuple[Tensor, Tensor] | None]
"""x [T, H] and, for a graft in place, the router's (index [T, k], weight [T, k])."""
Mixture: TypeAlias = Sequence[Sequence[tuple[int, float]]]
"""(expert, share) of every part of a graft's start, per MoE layer; empty: copies."""


class GraftSettings(Section):
    """The personal expert of every MoE layer."""

    per_layer: int = Field(default=1, ge=1)
    """Grafted experts per layer (r in the paper's Table 7), each with its own gate."""
    form: Literal["faithful", "preserving", "in_place"] = "faithful"
    """`faithful` adds the gated expert as in the paper; `preserving` adds its difference to its source, so that step 0 is the base;
    `in_place` adds no expert but adapts the source itself, behind the router's own weight: no gate then, and step 0 is the base."""
    train: Literal["lora", "full"] = "lora"
    """What of the expert is trained: low-rank pairs on gate, up and down (sizes from `lora`), or all its weights."""
    gate: Literal["learned", "fixed", "off"] = "learned"
    """`learned` (or `on`): trained with the expert; `fixed`: stays at its start; `off`: the expert is added with weight 1. Of no effect
    `in_place`."""
    gate_start: Literal["router_row", "low"] = "router_row"
    """`router_row`: the router's row of the source expert, no bias; `low`: weight 0 and bias -2, a sigmoid of 0.12. Of no effect
    without a gate."""
    mixture: int = Field(default=1, ge=1)
    """Experts that the graft's start is a weighted mean of, weights from the selection criterion; 1: a copy of one expert. More than 1
    needs `train: full`, `form: faithful` and `per_layer: 1`; biases and the gate's start are those of the best of them."""

    @property
    def has_gate(self) -> bool:
        """Whether a graft is behind a gate of its own."""
        return self.gate != "off" and self.form != "in_place"

    @property
    def learns_gate(self) -> bool:
        """Whether a graft has a gate among its leaves."""
        return self.has_gate and self.gate == "learned"

    @field_validator("gate", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        """YAML reads `on` and `off` as true and false."""
        return {True: "learned", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check_mixture(self) -> Self:
        if self.mixture > 1 and (self.train, self.form, self.per_layer) != ("full", "faithful", 1):
            raise ValueError(
                f"mixture: {self.mixture} mixes experts into new weights, which takes train: full, form: faithful and per_layer: 1 "
                f"(got {self.train}, {self.form}, {self.per_layer})"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Side:
    """One graft in use: its source expert (frozen views) and its leaves by `projection.part`."""

    place: tuple[int, int]
    """Layer, and number of the graft in it."""
    number: int
    """Which expert of the layer its source is."""
    source: Expert
    leaves: dict[str, Tensor]
    gate: Tensor | None
    """g [H]; None without a gate."""
    bias: Tensor | None

    @property
    def down(self) -> Tensor:
        """The weights [H, I] of the down projection: the leaves' own where they have them, else the source's."""
        return self.leaves.get("down.weight", self.source.down)


class Mixed(Protocol):
    """Grafts of several clients, each in use for rows of its own."""

    def added(self, site: Site, call: Arguments) -> Tensor:
        """What is added to the routed output [T, H]."""


class SideExperts:
    """The hooks on every MoE layer; without leaves in use they return the routed output untouched."""

    def __init__(self, anatomy: Anatomy, graft: GraftSettings, lora: LoraSettings) -> None:
        """Register the hooks.

        Raises:
            ValueError: `form` is `in_place` and the experts' outputs are not what the router's weights act on.
        """
        self.anatomy, self.graft, self.lora = anatomy, graft, lora
        self._active: dict[int, Sequence[Side | Mixed]] = {}
        self._see_gate: SeeGate | None = None
        for site in anatomy.sites if graft.form == "in_place" else ():
            if not site.replaceable:
                raise ValueError(f"graft.form: in_place: the experts of {site.path} do not run one by one; choose another form")
        for site in anatomy.sites:
            site.hooked.register_forward_hook(self._hook(site), with_kwargs=True)

    def put(self, tree: Mapping[str, Tensor], experts: list[list[int]]) -> set[str]:
        """Use the side leaves of `tree` and return their addresses; `experts` [L][r] names the source of every graft. Pointer work only."""
        self._active = {}
        used = set()
        for site, chosen in zip(self.anatomy.sites, experts, strict=False):
            sides = []
            for number, expert in enumerate(chosen):
                head = address.side_expert(site.layer, number, "")
                leaves = {name.removeprefix(head): leaf for name, leaf in tree.items() if name.startswith(head)}
                gate = {part: address.side_mix(site.layer, number, part) for part in ("weight", "bias")} if self.graft.learns_gate else {}
                if not leaves or (gate and gate["weight"] not in tree):
                    continue
                weight, bias = (tree.get(key) for key in gate.values()) if gate else self._still_gate(site, expert)
                source = self.anatomy.family.expert(site, expert)
                place = (site.layer, number)
                sides.append(Side(place=place, number=expert, source=source, leaves=leaves, gate=weight, bias=bias))
                used |= {*(key for key in gate.values() if key in tree), *(head + name for name in leaves)}
            if sides:
                self._active[site.layer] = sides
        return used

    def fresh(self, experts: list[list[int]], seed: int, mixture: Mixture = ()) -> Tree:
        """New leaves for the chosen source experts [L][r], fp32 on the CPU: LoRA with B = 0, exact copies, and the gates.

        A mixture is the start of the last graft of each layer.

        Raises:
            ValueError: `gate_start` is `router_row` and the router has no row for the experts' inputs.
        """
        family, tree = self.anatomy.family, Tree()
        for at, (site, chosen) in enumerate(zip(self.anatomy.sites, experts, strict=True)):
            for number, expert in enumerate(chosen):
                source = family.expert(site, expert)
                if self.graft.train == "full":
                    parts = mixture[at] if mixture and number == len(chosen) - 1 else [(expert, 1.0)]
                    for name, weight in self._mixed(site, parts).items():
                        tree[f"{address.side_expert(site.layer, number, name)}.weight"] = weight
                else:
                    tree |= fresh_pairs(_pairs(site, number, source, self.lora.rank), seed)
                if self.graft.learns_gate:
                    for part, leaf in zip(("weight", "bias"), self._gate_start(site, expert), strict=True):
                        if leaf is not None:
                            tree[address.side_mix(site.layer, number, part)] = leaf.cpu().clone()
        return tree

    def _mixed(self, site: Site, parts: Sequence[tuple[int, float]]) -> Tree:
        """Projection -> weighted mean of the experts' weights, summed in float64; one expert alone is copied exactly."""
        total: Tree = {}
        for expert, share in parts:
            for name, weight in self.anatomy.family.expert(site, expert).projections().items():
                term = weight.cpu().double() * share
                total[name] = total[name] + term if name in total else term
        return {name: weight.float().clone().contiguous() for name, weight in total.items()}

    def _gate_start(self, site: Site, expert: int) -> tuple[Tensor, Tensor | None]:
        """(g [H], bias [] or None), fp32."""
        if self.graft.gate_start == "low":
            return torch.zeros(site.inputs_width), torch.tensor(LOW_BIAS)
        return self.anatomy.family.router_row(site, expert).float(), None

    def _still_gate(self, site: Site, expert: int) -> tuple[Tensor | None, Tensor | None]:
        """The gate that is no leaf: where it started, or none."""
        if not self.graft.has_gate:
            return None, None
        device = compute_device(site.experts)
        weight, bias = self._gate_start(site, expert)
        return weight.to(device), None if bias is None else bias.to(device)

    @contextmanager
    def watching_gates(self, see: SeeGate) -> Iterator[None]:
        """Call `see` for every graft in use, in every forward inside the block."""
        self._see_gate = see
        try:
            yield
        finally:
            self._see_gate = None

    def _hook(self, site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            sides = self._active.get(site.layer)
            if not sides:
                return None
            call = (args, kwargs)
            for side in sides:
                added = self.of_one(side, self.seen(site, call)) if isinstance(side, Side) else side.added(site, call)
                output = add_to_output(output, added)
            return output

        return hook

    def seen(self, site: Site, call: Arguments) -> Seen:
        """What a call of the experts gives a graft; routing is read only where one is in place."""
        return site.inputs(call), site.routing(site, call) if self.graft.form == "in_place" else None

    def of_one(self, side: Side, seen: Seen) -> Tensor:
        """What one graft adds to the routed output [T, H]."""
        x, routing = seen
        return self._gated(side, x) if routing is None else self._in_place(side, x, *routing)

    def _gated(self, side: Side, x: Tensor) -> Tensor:
        """sigmoid(g.x) E_g(x) [T, H], or sigmoid(g.x) (E_g(x) - E_e(x)) in the preserving form; without a gate its weight is 1."""
        grafted = self._expert(side, x)
        if self.graft.form == "preserving":
            grafted = grafted - side.source(x)
        if side.gate is None:
            self._tell(side, torch.ones(len(x), device=x.device))
            return grafted
        mix = torch.sigmoid(F.linear(x.to(side.gate.dtype), side.gate[None], None if side.bias is None else side.bias[None]))
        self._tell(side, mix.detach().flatten())
        return mix * grafted

    def _in_place(self, side: Side, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """w_e (E_g(x) - E_e(x)) [T, H] for the tokens whose top k have the source expert e, zero for all others."""
        token, place = torch.where(index == side.number)
        share = weight[token, place]
        self._tell(side, torch.zeros(len(x), device=x.device).index_add(0, token, share.detach().float()))
        change = self._expert(side, x[token]) - side.source(x[token])
        return torch.zeros_like(x).index_add(0, token, (change * share[:, None]).to(x.dtype))

    def _tell(self, side: Side, gate: Tensor) -> None:
        if self._see_gate is not None:
            self._see_gate(*side.place, gate)

    def _expert(self, side: Side, x: Tensor) -> Tensor:
        """E_g(x) [T, H]: the source's weights with the leaves' low-rank terms, or the leaves' own weights."""
        source, leaves = side.source, side.leaves
        if "down.weight" not in leaves:
            return Pairs(leaves, self.lora).run(source, x, self.anatomy.model.training)
        hidden = source.activate(*projected(side, x))
        return F.linear(hidden, side.down.to(hidden.dtype), source.down_bias)


def projected(side: Side, x: Tensor) -> Projected:
    """(gate, up) of a graft without its low-rank terms: by the leaves' own weights where they have them, else by the source's."""
    source, leaves = side.source, side.leaves
    if "up.weight" not in leaves:
        return source.project(x)
    gate = F.linear(x, leaves["gate.weight"].to(x.dtype), source.gate_bias) if "gate.weight" in leaves else None
    return gate, F.linear(x, leaves["up.weight"].to(x.dtype), source.up_bias)


def side_shapes(anatomy: Anatomy, graft: GraftSettings, lora: LoraSettings, further: int = 0) -> Shapes:
    """Shapes of a client's graft leaves, the same whatever experts it chooses; `further` grafts per layer beside its own."""
    shapes: Shapes = {}
    for site in anatomy.sites:
        source = anatomy.family.expert(site, 0)
        for number in range(graft.per_layer + further):
            if graft.train == "full":
                for name, weight in source.projections().items():
                    shapes[f"{address.side_expert(site.layer, number, name)}.weight"] = tuple(weight.shape)
            else:
                shapes |= _pairs(site, number, source, lora.rank)
            if graft.learns_gate:
                shapes[address.side_mix(site.layer, number, "weight")] = (site.inputs_width,)
                if graft.gate_start == "low":
                    shapes[address.side_mix(site.layer, number, "bias")] = ()
    return shapes


def _pairs(site: Site, number: int, source: Expert, rank: int) -> Shapes:
    shapes: Shapes = {}
    for name, weight in source.projections().items():
        shapes |= pair_shapes(address.side_expert(site.layer, number, name), rank, weight.shape[1], weight.shape[0])
    return shapes
