"""One MoE layer of a loaded model, and how a call of it is read and added to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


@dataclass(frozen=True, kw_only=True)
class Routed:
    """What one MoE layer did in one forward. T = batch x length tokens, padding included; k = experts per token."""

    x: Tensor
    """Inputs of the experts [T, H]."""
    index: Tensor
    """Chosen experts [T, k]."""
    weight: Tensor
    """Their top-k weights [T, k], as the family computes them."""
    y: Tensor
    """Routed output [T, H], without shared experts and before any graft that was hooked later."""


def contract_inputs(call: Arguments) -> Tensor:
    """x [T, H] of a call under the experts contract, positional or by name."""
    args, kwargs = call
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x.reshape(-1, x.shape[-1])


def contract_routing(site: Site, call: Arguments) -> tuple[Tensor, Tensor]:
    """(index [T, k], weight [T, k]) of a call under the experts contract."""
    args, kwargs = call
    index, weight = (*args[1:], *(kwargs[name] for name in ("top_k_index", "top_k_weights")[len(args[1:]) :]))
    return index, weight


def first_output(output: Any) -> Tensor:
    """The hidden states in a module's output, which may be a tuple that begins with them."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def add_to_output(output: Any, extra: Tensor) -> Any:
    """A module's output with `extra` [T, H] added to its hidden states."""
    hidden = first_output(output)
    return with_hidden(output, hidden + extra.to(hidden.dtype).view_as(hidden))


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """A module's output with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@dataclass(frozen=True, kw_only=True)
class Site:
    """One MoE layer of a loaded model."""

    layer: int
    path: str
    """Module path of the hooked module, before any adapter is injected."""
    experts: Any
    """The module that holds the experts' parameters (an `nn.Module`)."""
    router: Any
    """The router module."""
    num_experts: int
    """Routed experts with weights of their own."""
    width: int
    """Expert width I."""
    inputs_width: int
    """Input width H of the experts; the model's hidden size unless they work in a smaller latent space."""
    top_k: int
    """Routed experts per token."""
    block: Any
    """The module that holds experts and router."""
    hooked: nn.Module
    """The module whose call is watched and added to: the experts module, or the block where experts are not called by the contract."""
    inputs: Callable[[Arguments], Tensor] = contract_inputs
    """Arguments of `hooked` -> x [T, H]."""
    routing: Callable[[Site, Arguments], tuple[Tensor, Tensor]] = contract_routing
    """(site, arguments of `hooked`) -> (index [T, k], weight [T, k])."""
    replaceable: bool = True
    """`hooked` is called by the experts contract, so a dispatch of our own can stand in for it."""
    identity: bool = False
    """Indices from `num_experts` on are zero-computation experts that return their input."""
    shared: list[nn.Module] = field(default_factory=list)
    """Shared experts beside the routed ones."""

    def routed(self, call: Arguments, output: Any) -> Routed:
        """What one call of `hooked` did."""
        index, weight = self.routing(self, call)
        hidden = first_output(output)
        return Routed(x=self.inputs(call), index=index, weight=weight, y=hidden.reshape(-1, hidden.shape[-1]))
