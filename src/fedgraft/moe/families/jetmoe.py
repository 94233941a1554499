"""JetMoE: `input_linear` [E, 2I, H] and `output_linear` [E, H, I] on tokens sorted by expert, so the block itself is hooked.

Its attention is a mixture of experts too; only the feed-forward experts are grafted.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fedgraft.moe.expert import Expert, fused_expert, gated
from fedgraft.moe.family import Family, blocks, found_sites, layer_number
from fedgraft.moe.site import Arguments, Site, contract_inputs


def sites(model: nn.Module) -> list[Site]:
    """Every feed-forward block with a router."""
    found = [(path, block) for path, block in blocks(model, "input_linear") if hasattr(block, "activation")]
    return found_sites(model, [_site(path, block) for path, block in found])


def _site(path: str, block: Any) -> Site:
    layer = layer_number(f"{path}.")
    assert layer is not None
    return Site(
        layer=layer,
        path=path,
        experts=block,
        router=block.router,
        num_experts=block.router.num_experts,
        width=block.hidden_size,
        inputs_width=block.input_size,
        top_k=block.router.top_k,
        block=block,
        hooked=block,
        routing=_routing,
        replaceable=False,
    )


def _routing(site: Site, call: Arguments) -> tuple[Tensor, Tensor]:
    logits = F.linear(contract_inputs(call), site.router.layer.weight).float()
    top, index = logits.topk(site.top_k, dim=-1)
    return index, top.softmax(-1)


def expert(site: Site, index: int) -> Expert:
    """Expert `index`; the block's own bias is added once after all experts and belongs to none."""
    block = site.experts
    first, down = block.input_linear.weight[index].detach(), block.output_linear.weight[index].detach()
    return fused_expert(first, down, gated(block.activation))


FAMILY = Family(sites=sites, expert=expert)
