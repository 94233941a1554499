"""LongCat-Flash: some experts compute nothing and return their input; they stand behind the real ones and cannot be grafted."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fedgraft.moe.expert import Expert, fused_expert, gated
from fedgraft.moe.family import Family, blocks, contract_site, found_sites
from fedgraft.moe.site import Site


def sites(model: nn.Module) -> list[Site]:
    """Every block with a router and experts; the experts are called by the contract, identity experts by the higher indices."""
    found = [contract_site(model, f"{path}.experts", block.experts, block.router, block) for path, block in blocks(model, "experts")]
    return found_sites(model, [replace(site, identity=True) for site in found])


def expert(site: Site, index: int) -> Expert:
    """Expert `index` of the real ones."""
    module = site.experts
    return fused_expert(module.gate_up_proj[index].detach(), module.down_proj[index].detach(), gated(module.act_fn))


FAMILY = Family(sites=sites, expert=expert)
