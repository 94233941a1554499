"""Watching what the experts modules are given: their inputs, the chosen experts and weights, and the routed output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fedgraft.moe.family import Site


@dataclass(frozen=True, kw_only=True)
class Routed:
    """What one experts module saw in one forward. T = batch x length tokens, padding included; k = experts per token."""

    x: Tensor
    """Inputs [T, H]."""
    index: Tensor
    """Chosen experts [T, k]."""
    weight: Tensor
    """Their top-k weights [T, k], as the family computes them."""
    y: Tensor
    """Routed output [T, H], without shared experts and before any graft that was hooked later."""


@contextmanager
def watching(sites: Sequence[Site], see: Callable[[Site, Routed], None]) -> Iterator[None]:
    """Call `see(site, routed)` for every MoE layer of every forward inside the block."""

    def hook_for(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x, index, weight = arguments(args, kwargs)
            see(site, Routed(x=x, index=index, weight=weight, y=output))

        return hook

    handles = [site.experts.register_forward_hook(hook_for(site), with_kwargs=True, prepend=True) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(x [T, H], index [T, k], weight [T, k]) of a call under the experts contract, positional or by name."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    x, index, weight = (*args, *(kwargs[name] for name in names[len(args) :]))
    return x.reshape(-1, x.shape[-1]), index, weight


def normalised(weight: Tensor) -> Tensor:
    """Top-k weights [T, k] scaled to sum 1 per token, in float64 (before any routed scaling factor)."""
    weight = weight.double()
    total: Tensor = weight.sum(-1, keepdim=True)
    return weight / total
