"""Forwards whose routed part is run by who reads it, so that no expert runs twice on a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedgraft.moe.load import Base
from fedgraft.moe.routing import watching
from fedgraft.moe.site import Routed, Site

See: TypeAlias = Callable[[Site, Tensor, Tensor, Tensor], Tensor]
"""(layer, x [T, H], index [T, k], weight [T, k]) -> the routed output [T, H]."""


@contextmanager
def reading(base: Base, see: See) -> Iterator[None]:
    """Call `see` for every MoE layer of every forward inside the block; what it returns stands in for what the experts would give.

    Experts in 16 bits run by themselves as well, since their own dispatch rounds in places of its own; so do those whose forward is not
    the class's.
    """
    exact = base.model.dtype in {torch.float32, torch.float64}
    replaced = [site for site in base.sites if exact and site.replaceable and "forward" not in vars(site.experts)]
    watched = [site for site in base.sites if site not in replaced]

    def watch(site: Site, routed: Routed) -> None:
        see(site, routed.x, routed.index, routed.weight)

    for site in replaced:
        site.experts.forward = _instead(site, see)
    try:
        with watching(watched, watch):
            yield
    finally:
        for site in replaced:
            del site.experts.forward


def _instead(site: Site, see: See) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else kwargs["hidden_states"]
        return see(site, site.inputs((args, kwargs)), *site.routing(site, (args, kwargs))).view_as(hidden)

    return forward
