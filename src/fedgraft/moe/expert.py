"""One pretrained expert, cut out of wherever an architecture keeps it. H = input width of the experts, I = expert width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgraft.moe.weights import part

Projected: TypeAlias = tuple[Tensor | None, Tensor]
"""(gate [T, I], up [T, I]) before the activation; gate is None for experts without a gate projection."""


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One expert as views into the model's parameters (no copy)."""

    gate: Tensor | None
    """[I, H]"""
    up: Tensor
    """[I, H]"""
    down: Tensor
    """[H, I]"""
    activate: Callable[[Tensor | None, Tensor], Tensor]
    """(gate, up) -> hidden [T, I]."""
    project: Callable[[Tensor], Projected]
    """x [T, H] -> (gate, up) with their biases, in one product where the weights are fused."""
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Output [T, H] for x [T, H]."""
        return F.linear(self.activate(*self.project(x)), self.down, self.down_bias)

    def projections(self) -> dict[str, Tensor]:
        """The frozen weights by projection: gate [I, H] (if any), up [I, H], down [H, I]."""
        return ({} if self.gate is None else {"gate": self.gate}) | {"up": self.up, "down": self.down}


def fused_expert(
    first: Tensor,
    down: Tensor,
    activate: Callable[[Tensor | None, Tensor], Tensor],
    *,
    first_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    has_gate: bool = True,
    concatenated: bool = True,
) -> Expert:
    """An expert whose gate and up rows lie in one tensor.

    Args:
        first: [2I, H], gate rows then up rows, or in turns where not `concatenated`; [I, H] without a gate.
        down: [H, I]
        activate: (gate, up) -> hidden.
        first_bias: [2I] or [I], in the order of `first`.
        down_bias: [H]
        has_gate: whether there is a gate projection.
        concatenated: [gate; up], else gate and up rows in turns.
    """

    def split(fused: Tensor, axis: int) -> Projected:
        if not has_gate:
            return None, fused
        if concatenated:
            gate, up = fused.chunk(2, dim=axis)
            return gate, up
        even, odd = ([slice(None)] * fused.ndim for _ in range(2))
        even[axis], odd[axis] = slice(0, None, 2), slice(1, None, 2)
        return fused[tuple(even)], fused[tuple(odd)]

    gate, up = split(first, 0)
    gate_bias, up_bias = (None, None) if first_bias is None else split(first_bias, 0)
    return Expert(
        gate=gate,
        up=up,
        down=down,
        activate=activate,
        project=lambda x: split(F.linear(x, first, first_bias), -1),
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
    )


def contract_expert(module: Any, index: int) -> Expert:
    """Expert `index` of an experts module that follows transformers' experts contract (`use_experts_implementation`)."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    fused, down = part(module, first, index), part(module, "down_proj", index)
    return fused_expert(
        fused.mT if module.is_transposed else fused,
        down.mT if module.is_transposed else down,
        _activation(module),
        first_bias=part(module, f"{first}_bias", index) if module.has_bias else None,
        down_bias=part(module, "down_proj_bias", index) if module.has_bias else None,
        has_gate=bool(module.has_gate),
        concatenated=bool(module.is_concatenated),
    )


def gated(act_fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor | None, Tensor], Tensor]:
    """act(gate) * up, or act(up) where there is no gate projection."""

    def activate(gate: Tensor | None, up: Tensor) -> Tensor:
        return act_fn(up) if gate is None else act_fn(gate) * up

    return activate


def _activation(module: Any) -> Callable[[Tensor | None, Tensor], Tensor]:
    """The module's own gating; the default one without first fusing gate and up again."""
    if getattr(type(module)._apply_gate, "__name__", "") == "_default_apply_gate" or not module.has_gate:
        return gated(module.act_fn)

    def custom(gate: Tensor | None, up: Tensor) -> Tensor:
        assert gate is not None
        fused = torch.cat([gate, up], -1) if module.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
        result: Tensor = module._apply_gate(fused)
        return result

    return custom
