"""Brute force: the real blocks, run at the unmodified model's inputs with their router's answer replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedgraft.moe.load import Base
from fedgraft.moe.site import Site

Answer = tuple[Tensor, Tensor, Tensor]  # logits [T, E], weights [T, k], experts [T, k]


@dataclass(frozen=True)
class Rows:
    """A batch: `ids` and `mask` [B, T]."""

    ids: Tensor
    mask: Tensor


def rows(*lengths: int, seed: int = 0, width: int | None = None) -> Rows:
    """Random rows of these lengths, right-padded to `width` (default: the longest)."""
    width = width or max(lengths)
    ids = torch.randint(3, 259, (len(lengths), 64), generator=torch.Generator().manual_seed(seed))[:, :width]
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return Rows(ids * mask, mask)


def layer_inputs(base: Base, batch: Rows) -> list[Tensor]:
    """Inputs [T, H] of every MoE block for the real tokens."""
    inputs: list[Tensor] = []
    blocks = [base.model.get_submodule(site.path.rpartition(".")[0]) for site in base.sites]
    handles = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1))) for block in blocks]
    with torch.no_grad():
        base.model(input_ids=batch.ids, attention_mask=batch.mask)
    for handle in handles:
        handle.remove()
    return [x[batch.mask.flatten() != 0] for x in inputs]


def routed(base: Base, site: Site, x: Tensor, answer: Callable[[Answer], Answer]) -> Tensor:
    """Routed output [T, H], in float64, of the site's block at x when its router answers `answer(its own answer)`."""
    outputs: list[Tensor] = []
    handles = [
        site.router.register_forward_hook(lambda module, args, own: answer(own)),
        site.experts.register_forward_hook(lambda module, args, output: outputs.append(output)),
    ]
    with torch.no_grad():
        base.model.get_submodule(site.path.rpartition(".")[0])(x[None])
    for handle in handles:
        handle.remove()
    return outputs[0].double()


def as_is(own: Answer) -> Answer:
    """The router itself."""
    return own


def unit_sum(own: Answer) -> Answer:
    """Top-k weights that sum to 1."""
    logits, weight, index = own
    return logits, (weight.double() / weight.double().sum(-1, keepdim=True)).to(logits.dtype), index


def masked_to(subset: Sequence[int]) -> Callable[[Answer], Answer]:
    """The router that knows only `subset`: its softmax over these experts, all of them used."""

    def answer(own: Answer) -> Answer:
        logits = own[0]
        masked = torch.full_like(logits, -torch.inf)
        masked[:, list(subset)] = logits[:, list(subset)]
        weight, index = masked.double().softmax(-1).topk(len(subset))
        return logits, weight.to(logits.dtype), index

    return answer


def subset_loss(base: Base, site: Site, x: Tensor, subset: Sequence[int], full: Callable[[Answer], Answer] = unit_sum) -> float:
    """||R - R_S||_F^2 by two forwards."""
    return float((routed(base, site, x, full) - routed(base, site, x, masked_to(subset))).square().sum())
