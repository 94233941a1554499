"""Watching what the MoE layers do: their inputs, the chosen experts and weights, and the routed output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fedgraft.moe.site import Routed, Site


@contextmanager
def watching(sites: Sequence[Site], see: Callable[[Site, Routed], None], grafted: bool = False) -> Iterator[None]:
    """Call `see(site, routed)` for every MoE layer of every forward inside the block; `grafted`: y with what grafts have added to it."""

    def hook_for(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            see(site, site.routed((args, kwargs), output))

        return hook

    handles = [site.hooked.register_forward_hook(hook_for(site), with_kwargs=True, prepend=not grafted) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def normalised(weight: Tensor) -> Tensor:
    """Top-k weights [T, k] scaled to sum 1 per token, in float64 (before any routed scaling factor); a token without weight keeps zeros."""
    weight = weight.double()
    total: Tensor = weight.sum(-1, keepdim=True)
    return weight / total.where(total != 0, 1)
