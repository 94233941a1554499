"""Gemma 4: the router reads the residual stream through its own norm and scale, the experts through another norm.

Both norms divide by the same root mean square, so the router's row carried over to the experts' inputs is W_e * scale / sqrt(H) / n, n
being the weight of the experts' norm: the gate then starts at the router's own logit.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from fedgraft.moe.family import Family, general_sites
from fedgraft.moe.site import Site


def sites(model: nn.Module) -> list[Site]:
    """The general rule; every layer's dense MLP runs beside the routed experts, so it counts as a shared expert."""
    return [replace(site, shared=[site.block.mlp]) for site in general_sites(model)]


def router_row(site: Site, index: int) -> Tensor:
    """Router row [H] of expert `index`, for the experts' inputs."""
    router, norm = site.router, site.block.pre_feedforward_layernorm_2
    row: Tensor = router.proj.weight[index] * router.scale * router.scalar_root_size / norm.weight
    return row.detach()


FAMILY = Family(sites=sites, router_row=router_row)
