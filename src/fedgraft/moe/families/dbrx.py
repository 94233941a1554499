"""DBRX: the experts' weights lie row after row in `mlp.w1` (gate), `mlp.v1` (up) and `mlp.w2` (down), [E * I, H] each."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from fedgraft.moe.expert import Expert, gated
from fedgraft.moe.family import Family, blocks, found_sites, layer_number
from fedgraft.moe.site import Site


def sites(model: nn.Module) -> list[Site]:
    """Every block with a router and experts; the experts are called by the contract."""
    return found_sites(model, [_site(f"{path}.experts", block) for path, block in blocks(model, "experts")])


def _site(path: str, block: Any) -> Site:
    layer = layer_number(path)
    assert layer is not None
    return Site(
        layer=layer,
        path=path,
        experts=block.experts,
        router=block.router,
        num_experts=block.experts.num_experts,
        width=block.experts.ffn_hidden_size,
        inputs_width=block.experts.hidden_size,
        top_k=block.top_k,
        block=block,
        hooked=block.experts,
    )


def expert(site: Site, index: int) -> Expert:
    """Expert `index` as three slices of rows."""
    mlp, rows = site.experts.mlp, slice(index * site.width, (index + 1) * site.width)
    gate, up, down = mlp.w1[rows].detach(), mlp.v1[rows].detach(), mlp.w2[rows].detach().mT
    return Expert(gate=gate, up=up, down=down, activate=gated(mlp.activation_fn), project=lambda x: (F.linear(x, gate), F.linear(x, up)))


FAMILY = Family(sites=sites, expert=expert)
