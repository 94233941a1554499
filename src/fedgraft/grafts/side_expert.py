"""The graft of FLEx: whole experts beside the frozen ones, each behind its own learned gate (arXiv 2506.00965).

Faithful form: y = R(x) + sum_j sigmoid(g_j . x) E_gj(x), added where the routed experts' output leaves the experts module.
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
from fedgraft.grafts.lora import LoraSettings, fresh_pair
from fedgraft.moe.family import Expert
from fedgraft.moe.load import Base
from fedgraft.moe.routing import arguments
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
    """The hooks on every experts module; without leaves in use they return the routed output untouched."""

    def __init__(self, base: Base, graft: GraftSettings, lora: LoraSettings) -> None:
        self.base, self.graft, self.lora = base, graft, lora
        self._active: dict[int, list[Side]] = {}
        self._see_gate: SeeGate | None = None
        for site in base.sites:
            site.experts.register_forward_hook(self._hook(site.layer), with_kwargs=True)

    def put(self, tree: Mapping[str, Tensor], experts: list[list[int]]) -> set[str]:
        """Use the side leaves of `tree` and return their addresses; `experts` [L][r] names the source of every graft. Pointer work only."""
        self._active = {}
        used = set()
        for site, chosen in zip(self.base.sites, experts, strict=False):
            sides = []
            for number, expert in enumerate(chosen):
                key, bias = (address.side_mix(site.layer, number, part) for part in ("weight", "bias"))
                if key not in tree:
                    continue
                head = f"layers.{site.layer}.side.{number}.expert."
                leaves = {name.removeprefix(head): leaf for name, leaf in tree.items() if name.startswith(head)}
                source = self.base.family.expert(site, expert)
                sides.append(Side(place=(site.layer, number), source=source, leaves=leaves, gate=tree[key], bias=tree.get(bias)))
                used |= {key, *([bias] if bias in tree else []), *(head + name for name in leaves)}
            if sides:
                self._active[site.layer] = sides
        return used

    def fresh(self, experts: list[list[int]], seed: int) -> Tree:
        """New leaves for the chosen source experts [L][r], fp32 on the CPU: LoRA with B = 0 or exact copies, and the gates."""
        tree: Tree = {}
        for site, chosen in zip(self.base.sites, experts, strict=True):
            for number, expert in enumerate(chosen):
                for name, weight in self.base.family.expert(site, expert).projections().items():
                    if self.graft.train == "full":
                        tree[address.side_expert(site.layer, number, name, "weight")] = weight.detach().float().cpu().clone().contiguous()
                    else:
                        keys = [address.side_expert(site.layer, number, name, part) for part in ("A", "B")]
                        tree |= fresh_pair(keys[0], keys[1], self.lora.rank, weight.shape[1], weight.shape[0], seed)
                row = self.base.family.router_row(site, expert).float().cpu()
                low = self.graft.gate_start == "low"
                tree[address.side_mix(site.layer, number, "weight")] = torch.zeros_like(row) if low else row.clone()
                if low:
                    tree[address.side_mix(site.layer, number, "bias")] = torch.tensor(LOW_BIAS)
        return tree

    @contextmanager
    def watching_gates(self, see: SeeGate) -> Iterator[None]:
        """Call `see` for every graft in use, in every forward inside the block."""
        self._see_gate = see
        try:
            yield
        finally:
            self._see_gate = None

    def _hook(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            sides = self._active.get(layer)
            if not sides:
                return None
            x, _, _ = arguments(args, kwargs)
            result = output
            for side in sides:
                result = result + self._gated(side, x, module.training).to(output.dtype).view_as(output)
            return result

        return hook

    def _gated(self, side: Side, x: Tensor, training: bool) -> Tensor:
        mix = torch.sigmoid(F.linear(x.to(side.gate.dtype), side.gate[None], None if side.bias is None else side.bias[None]))
        if self._see_gate is not None:
            self._see_gate(*side.place, mix.detach().flatten())
        grafted = self._expert(side, x, training)
        if self.graft.form == "preserving":
            grafted = grafted - side.source(x)
        return mix * grafted

    def _expert(self, side: Side, x: Tensor, training: bool) -> Tensor:
        """E_g(x) [T, H]: the source's weights with the leaves' low-rank terms, or the leaves' own weights."""
        source, leaves = side.source, side.leaves
        if "down.weight" in leaves:
            gate = F.linear(x, leaves["gate.weight"].to(x.dtype)) if "gate.weight" in leaves else None
            up = F.linear(x, leaves["up.weight"].to(x.dtype))
            if source.fused_bias is not None:
                gate_bias, up_bias = source.split(source.fused_bias)
                gate, up = (None if gate is None or gate_bias is None else gate + gate_bias), up + up_bias
            hidden = source.activate(gate, up)
            return F.linear(hidden, leaves["down.weight"].to(hidden.dtype), source.down_bias)
        gate, up = source.split(F.linear(x, source.fused, source.fused_bias))
        dropped = F.dropout(x, self.lora.dropout, training)
        if gate is not None:
            gate = gate + self._low_rank(leaves, "gate", dropped).to(gate.dtype)
        up = up + self._low_rank(leaves, "up", dropped).to(up.dtype)
        hidden = source.activate(gate, up)
        down = F.linear(hidden, source.down, source.down_bias)
        return down + self._low_rank(leaves, "down", F.dropout(hidden, self.lora.dropout, training)).to(down.dtype)

    def _low_rank(self, leaves: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
        factor_a, factor_b = leaves[f"{name}.A"], leaves[f"{name}.B"]
        scale = self.lora.alpha / factor_a.shape[0]
        return F.linear(F.linear(x.to(factor_a.dtype), factor_a), factor_b) * scale
