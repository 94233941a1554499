"""An ordinary PyTorch training loop, kept as the reference that `fit` must equal, and what it trains on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgraft.data.batches import Batch
from fedgraft.grafts.graft import GraftedModel
from fedgraft.training.settings import TrainingSettings
from fedgraft.tree import Tree, combine

EXPERTS = [[5], [2]]
LR = 1e-3


def batches(count: int, rows: int = 4, seed: int = 0) -> list[Batch]:
    """`count` batches of random right-padded rows, the response being their second part."""
    rng = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(3, 259, (rows, 12), generator=rng)
        lengths, starts = torch.randint(8, 13, (rows, 1), generator=rng), torch.randint(3, 7, (rows, 1), generator=rng)
        place = torch.arange(12)[None]
        real = place < lengths
        made.append(Batch(ids * real, real.long(), torch.where(real & (place >= starts), ids, -100)))
    return made


def halves(batch: Batch) -> list[Batch]:
    """The batch as two of half its rows (2 and 2 of 4, 1 and 2 of 3)."""
    cut = len(batch.ids) // 2
    return [Batch(batch.ids[rows], batch.mask[rows], batch.labels[rows]) for rows in (slice(0, cut), slice(cut, None))]


def leaves(model: GraftedModel, seed: int = 1, experts: list[list[int]] | None = None) -> Tree:
    """Attention and side leaves, B included, at a small random distance from fresh ones."""
    rng = torch.Generator().manual_seed(seed)
    fresh = combine(model.fresh_adapters(0), model.fresh_side(experts or EXPERTS, 0))
    return {key: leaf + 0.05 * torch.randn(leaf.shape, generator=rng) for key, leaf in fresh.items()}


def train(
    model: GraftedModel,
    start: Mapping[str, Tensor],
    steps: Sequence[Batch],
    settings: TrainingSettings,
    *,
    seed: int = 0,
    lr: float = LR,
    extra: Callable[[Tree, Batch], Tensor] | None = None,
    padded: bool = False,
    fused: bool = True,
) -> tuple[Tree, list[float]]:
    """(trained leaves, loss of each step): dropout drawn from torch's default generator, AdamW, clipping, the responses' mean loss.

    `padded`: MoE layers see all tokens, as in a loop that knows nothing of padding and of what has no part in the loss.
    `fused`: AdamW's kernel, which rounds otherwise.
    """
    assert model.base.compacts
    tree = {key: start[key].detach().clone().requires_grad_() for key in sorted(start)}
    optimizer = torch.optim.AdamW(tree.values(), lr=lr, weight_decay=settings.weight_decay, fused=fused)
    losses = []
    model.base.model.train()
    with torch.random.fork_rng(), model.using(tree, EXPERTS):
        torch.manual_seed(seed)
        for batch in steps:
            optimizer.zero_grad()
            with nullcontext() if padded else model.base.without_padding(batch.mask, batch.predicting):
                logits = model.base.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=-100)
            losses.append(loss.item())
            (loss if extra is None else loss + extra(tree, batch)).backward()
            torch.nn.utils.clip_grad_norm_(tree.values(), settings.clip)
            optimizer.step()
    model.base.model.eval()
    return {key: leaf.detach() for key, leaf in tree.items()}, losses
