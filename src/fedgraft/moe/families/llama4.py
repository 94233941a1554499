"""Llama 4: all experts run at once on inputs that the block has multiplied by the router's scores, so the block itself is hooked.

The scores act on the inputs, so R(x) is the sum of E_i(s_i x). The model routes to one expert, whose normalised weight is 1; the raw forms
of the profile, which scale the output, are not this family's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedgraft.moe.expert import Expert, fused_expert, gated
from fedgraft.moe.family import Family, blocks, found_sites, layer_number, shared_experts
from fedgraft.moe.site import Arguments, Site, contract_inputs


def sites(model: nn.Module) -> list[Site]:
    """Every block with a router and experts."""
    return found_sites(model, [_site(path, block) for path, block in blocks(model, "experts")])


def _site(path: str, block: Any) -> Site:
    layer = layer_number(f"{path}.")
    assert layer is not None
    experts, width, inputs = block.experts.down_proj.shape
    return Site(
        layer=layer,
        path=path,
        experts=block.experts,
        router=block.router,
        num_experts=experts,
        width=width,
        inputs_width=inputs,
        top_k=block.top_k,
        block=block,
        hooked=block,
        routing=_routing,
        replaceable=False,
        shared=shared_experts(block),
    )


def _routing(site: Site, call: Arguments) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(contract_inputs(call), site.router.weight)
    top, index = logits.topk(site.top_k, dim=-1)
    return index, top.float().sigmoid().to(top.dtype)


def expert(site: Site, index: int) -> Expert:
    """Expert `index`: gate and up side by side, stored transposed."""
    module = site.experts
    return fused_expert(module.gate_up_proj[index].detach().mT, module.down_proj[index].detach().mT, gated(module.act_fn))


FAMILY = Family(sites=sites, expert=expert)
