"""The graft of FLEx: whole experts beside the frozen ones, each behind its own learned gate (arXiv 2506.00965).

Faithful form: y = R(x) + sum_j sigmoid(g_j . x) E_gj(x), added where the routed experts' output leaves their module.
Output-preserving form: E_gj(x) - E_ej(x) in place of E_gj(x), which is the base model at step 0. The frozen weights of a graft alias its
source expert; only the leaves are new memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fedgraft import address
from fedgraft.grafts.lora import LoraSettings, Pairs, Shapes, fresh_pairs, pair_shapes
from fedgraft.moe.expert import Expert
from fedgraft.moe.family import Anatomy
from fedgraft.moe.site import Site, add_to_output
from fedgraft.settings import Section
from fedgraft.tree import Tree

LOW_BIAS = -2.0
SeeGate: TypeAlias = Callable[[int, int, Tensor], None]
"""Called with layer, number of the graft in it and sigmoid(g.x) [T], T = batch x length tokens, padding included."""


class GraftSettings(Section):
    """The personal expert of every MoE layer."""

    per_layer: int = Field(default=1, ge=1)
    """Grafted experts per layer (r in the paper's Table 7), each with its own gate."""
    form: Literal["faithful", "preserving"] = "faithful"
    """`faithful` adds the gated expert as in the paper; `preserving` adds its difference to its source, so that step 0 is the base."""
    train: Literal["lora", "full"] = "lora"
    """What of the expert is trained: low-rank pairs on gate, up and down (sizes from `lora`), or all its weights."""
    gate_start: Literal["router_row", "low"] = "router_row"
    """`router_row`: the router's row of the source expert, no bias; `low`: weight 0 and bias -2, a sigmoid of 0.12."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One graft in use: its source expert (frozen views) and its leaves by `projection.part`."""

    place: tuple[int, int]
    """Layer, and number of the graft in it."""
    source: Expert
    leaves: dict[str, Tensor]
    gate: Tensor
    """g [H]"""
    bias: Tensor | None


class SideExperts:
    """The hooks on every MoE layer; without leaves in use they return the routed output untouched."""

    def __init__(self, anatomy: Anatomy, graft: GraftSettings, lora: LoraSettings) -> None:
        self.anatomy, self.graft, self.lora = anatomy, graft, lora
        self._active: dict[int, list[Side]] = {}
        self._see_gate: SeeGate | None = None
        for site in anatomy.sites:
            site.hooked.register_forward_hook(self._hook(site), with_kwargs=True)

    def put(self, tree: Mapping[str, Tensor], experts: list[list[int]]) -> set[str]:
        """Use the side leaves of `tree` and return their addresses; `experts` [L][r] names the source of every graft. Pointer work only."""
        self._active = {}
        used = set()
        for site, chosen in zip(self.anatomy.sites, experts, strict=False):
            sides = []
            for number, expert in enumerate(chosen):
                key, bias = (address.side_mix(site.layer, number, part) for part in ("weight", "bias"))
                if key not in tree:
                    continue
                head = address.side_expert(site.layer, number, "")
                leaves = {name.removeprefix(head): leaf for name, leaf in tree.items() if name.startswith(head)}
                source = self.anatomy.family.expert(site, expert)
                sides.append(Side(place=(site.layer, number), source=source, leaves=leaves, gate=tree[key], bias=tree.get(bias)))
                used |= {key, *([bias] if bias in tree else []), *(head + name for name in leaves)}
            if sides:
                self._active[site.layer] = sides
        return used

    def fresh(self, experts: list[list[int]], seed: int) -> Tree:
        """New leaves for the chosen source experts [L][r], fp32 on the CPU: LoRA with B = 0 or exact copies, and the gates.

        Raises:
            ValueError: `gate_start` is `router_row` and the router has no row for the experts' inputs.
        """
        family, tree = self.anatomy.family, Tree()
        for site, chosen in zip(self.anatomy.sites, experts, strict=True):
            for number, expert in enumerate(chosen):
                source = family.expert(site, expert)
                if self.graft.train == "full":
                    for name, weight in source.projections().items():
                        tree[f"{address.side_expert(site.layer, number, name)}.weight"] = weight.float().cpu().clone().contiguous()
                else:
                    tree |= fresh_pairs(_pairs(site, number, source, self.lora.rank), seed)
                if self.graft.gate_start == "low":
                    tree[address.side_mix(site.layer, number, "weight")] = torch.zeros(site.inputs_width)
                    tree[address.side_mix(site.layer, number, "bias")] = torch.tensor(LOW_BIAS)
                else:
                    tree[address.side_mix(site.layer, number, "weight")] = family.router_row(site, expert).float().cpu().clone()
        return tree

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
            x = site.inputs((args, kwargs))
            for side in sides:
                output = add_to_output(output, self._gated(side, x))
            return output

        return hook

    def _gated(self, side: Side, x: Tensor) -> Tensor:
        mix = torch.sigmoid(F.linear(x.to(side.gate.dtype), side.gate[None], None if side.bias is None else side.bias[None]))
        if self._see_gate is not None:
            self._see_gate(*side.place, mix.detach().flatten())
        grafted = self._expert(side, x)
        if self.graft.form == "preserving":
            grafted = grafted - side.source(x)
        return mix * grafted

    def _expert(self, side: Side, x: Tensor) -> Tensor:
        """E_g(x) [T, H]: the source's weights with the leaves' low-rank terms, or the leaves' own weights."""
        source, leaves = side.source, side.leaves
        if "down.weight" not in leaves:
            return Pairs(leaves, self.lora).run(source, x, self.anatomy.model.training)
        gate = F.linear(x, leaves["gate.weight"].to(x.dtype), source.gate_bias) if "gate.weight" in leaves else None
        up = F.linear(x, leaves["up.weight"].to(x.dtype), source.up_bias)
        hidden = source.activate(gate, up)
        return F.linear(hidden, leaves["down.weight"].to(hidden.dtype), source.down_bias)


def side_shapes(anatomy: Anatomy, graft: GraftSettings, lora: LoraSettings) -> Shapes:
    """Shapes of a client's graft leaves, which are the same whatever experts it chooses."""
    shapes: Shapes = {}
    for site in anatomy.sites:
        source = anatomy.family.expert(site, 0)
        for number in range(graft.per_layer):
            if graft.train == "full":
                for name, weight in source.projections().items():
                    shapes[f"{address.side_expert(site.layer, number, name)}.weight"] = tuple(weight.shape)
            else:
                shapes |= _pairs(site, number, source, lora.rank)
            shapes[address.side_mix(site.layer, number, "weight")] = (site.inputs_width,)
            if graft.gate_start == "low":
                shapes[address.side_mix(site.layer, number, "bias")] = ()
    return shapes


def _pairs(site: Site, number: int, source: Expert, rank: int) -> Shapes:
    shapes: Shapes = {}
    for name, weight in source.projections().items():
        shapes |= pair_shapes(address.side_expert(site.layer, number, name), rank, weight.shape[1], weight.shape[0])
    return shapes
