"""The pretrained model changed by hand, without anything of the grafts' code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedgraft.moe.load import Base
from fedgraft.moe.site import Site
from fedgraft.tree import Tree

IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(7))
MASK = (torch.arange(12) < torch.tensor([12, 9])[:, None]).long()


@torch.no_grad()
def logits(base: Base) -> Tensor:
    """Logits of the two rows, [2, 12, V]."""
    result: Tensor = base.model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    return result


def random_leaves(tree: Mapping[str, Tensor], seed: int = 1) -> Tree:
    """Leaves of the same addresses and shapes, random at the scale of a trained one."""
    rng = torch.Generator().manual_seed(seed)
    return {key: leaf + 0.3 * torch.randn(leaf.shape, generator=rng) for key, leaf in tree.items()}


def merge_attention(base: Base, tree: Mapping[str, Tensor], scale: float) -> Base:
    """W + scale B A written into the attention weights."""
    for layer in range(len(base.sites)):
        for role in "qkvo":
            key = f"layers.{layer}.attention.{role}"
            if f"{key}.A" in tree:
                linear = base.model.get_submodule(f"model.layers.{layer}.self_attn.{role}_proj")
                linear.weight.data += scale * tree[f"{key}.B"] @ tree[f"{key}.A"]
    return base


def graft_by_hand(base: Base, tree: Mapping[str, Tensor], experts: list[list[int]], scale: float, preserving: bool = False) -> Base:
    """y + sum_j sigmoid(g_j.x + b_j) (E_gj(x) [- E_ej(x)]), each expert run by a copy of its module that routes to it alone."""
    for site, chosen in zip(base.sites, experts, strict=True):
        terms = []
        for number, expert in enumerate(chosen):
            head = f"layers.{site.layer}.side.{number}"
            leaves = {key.removeprefix(f"{head}.expert."): leaf for key, leaf in tree.items() if key.startswith(f"{head}.expert.")}
            bias = tree.get(f"{head}.mix.bias", torch.tensor(0.0))
            source = alone(site, expert, {}, scale) if preserving else None
            terms.append((alone(site, expert, leaves, scale), source, tree[f"{head}.mix.weight"], bias))

        def hook(module, args, kwargs, y, terms=terms):
            x = args[0] if args else kwargs["hidden_states"]
            for grafted, source, row, bias in terms:
                gate = 1 / (1 + torch.exp(-(x @ row) - bias))
                y = y + gate[:, None] * (grafted(x) if source is None else grafted(x) - source(x))
            return y

        site.experts.register_forward_hook(hook, with_kwargs=True)
    return base


def alone(site: Site, expert: int, leaves: Mapping[str, Tensor], scale: float) -> Callable[[Tensor], Tensor]:
    """The output of one expert, its weights replaced by `leaves` (full) or raised by scale B A (LoRA)."""
    module = copy.deepcopy(site.experts)
    module._forward_hooks.clear()
    width = module.down_proj.shape[2]
    parts = {"gate": module.gate_up_proj.data[expert, :width], "up": module.gate_up_proj.data[expert, width:]}
    for name, weight in (parts | {"down": module.down_proj.data[expert]}).items():
        if f"{name}.weight" in leaves:
            weight.copy_(leaves[f"{name}.weight"])
        if f"{name}.A" in leaves:
            weight.add_(scale * leaves[f"{name}.B"] @ leaves[f"{name}.A"])

    def run(x: Tensor) -> Tensor:
        index = torch.full((len(x), 1), expert)
        output: Tensor = module(x, index, torch.ones(len(x), 1))
        return output

    return run
