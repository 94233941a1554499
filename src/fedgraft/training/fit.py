"""The only training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgraft import seeds
from fedgraft.data.batches import Batch
from fedgraft.grafts.graft import Experts, GraftedModel
from fedgraft.training.settings import TrainingSettings
from fedgraft.tree import Tree, clone, combine

Penalty: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]
"""Extra loss term of the trained leaves (FedProx, Ditto, ...), added once per optimiser step."""
GradientHook: TypeAlias = Callable[[Mapping[str, Tensor]], None]
"""Sees the trained leaves when a step's gradients are complete, and may change the gradients in place (SCAFFOLD, ...)."""
StepReport: TypeAlias = Callable[[int, int, float], None]
"""(optimiser steps done, steps in all, loss of the last one), for people who wait."""


class RowGradients(Protocol):
    """Stands between the gradients of single rows and the optimiser (DP-SGD)."""

    def take(self, leaves: Mapping[str, Tensor]) -> None:
        """The gradients are those of one row's mean loss; takes them away."""

    def give(self, leaves: Mapping[str, Tensor]) -> None:
        """Puts the gradients of the whole step in their place."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What one call of `fit` leaves behind."""

    tree: Tree
    """The trained leaves, fp32."""
    loss: float
    """Mean response loss over all steps, nats per response token."""
    tokens: int
    """Tokens that went through the model, padding not counted."""
    seconds: float
    moments: dict[str, Tree] = field(default_factory=dict)
    """AdamW's state by name (exp_avg, exp_avg_sq, step), for `optimizer_state: kept`."""


class NotFiniteError(ValueError):
    """The loss or its gradient became NaN or infinite."""


def fit(
    model: GraftedModel,
    trained: Mapping[str, Tensor],
    steps: Sequence[Sequence[Batch]],
    settings: TrainingSettings,
    *,
    lr: float,
    seed: int,
    experts: Experts,
    fixed: Mapping[str, Tensor] | None = None,
    penalty: Penalty | None = None,
    on_gradients: GradientHook | None = None,
    moments: Mapping[str, Tree] | None = None,
    report: StepReport = lambda done, total, loss: None,
    by_rows: RowGradients | None = None,
) -> Fit:
    """Train a copy of the leaves `trained` with AdamW; `fixed` leaves are in use but not changed.

    Args:
        model: the shared grafted base, frozen.
        trained: start values; not modified.
        steps: the batches of every optimiser step, one per accumulation part.
        settings: optimiser, precision, checkpointing.
        lr: learning rate of this round.
        seed: seed of everything random inside (dropout).
        experts: source experts of the client's grafts.
        fixed: further leaves of the client's model.
        penalty: extra loss term.
        on_gradients: called once per optimiser step, before clipping.
        moments: AdamW's state from an earlier call, to continue with.
        report: hears of every finished step.
        by_rows: every part is one row, and all rows count the same; a step may have none.

    Raises:
        NotFiniteError: the loss or its gradient became NaN or infinite; nothing is returned, so the caller's leaves stand.
    """
    leaves = {key: leaf.requires_grad_() for key, leaf in model.placed(clone(trained)).items()}
    order = sorted(leaves)
    optimizer = torch.optim.AdamW([leaves[key] for key in order], lr=lr, weight_decay=settings.weight_decay, foreach=True)
    if moments:
        _restore(optimizer, order, leaves, moments)
    began, total, tokens = time.perf_counter(), 0.0, 0
    with _training(model, settings), seeds.torch_default(seed), model.using(combine(leaves, fixed or {}), experts):
        for done, parts in enumerate(steps, start=1):
            loss = _step(model, parts, settings, leaves, penalty, by_rows)
            if on_gradients is not None:
                on_gradients(leaves)
            norm = float(torch.nn.utils.clip_grad_norm_([leaves[key] for key in order], settings.clip, foreach=True))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NotFiniteError(
                    f"the loss became {loss} (gradient norm {norm}); lower training.lr, or check the data and the base model"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss
            tokens += sum(part.tokens for part in parts)
            report(done, len(steps), loss)
    kept = _moments(optimizer, order, leaves) if settings.optimizer_state == "kept" else {}
    return Fit(tree=clone(leaves), loss=total / len(steps), tokens=tokens, seconds=time.perf_counter() - began, moments=kept)


def autocast(precision: str, device: torch.device) -> Any:
    """The autocast context of a precision setting."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _step(
    model: GraftedModel,
    parts: Sequence[Batch],
    settings: TrainingSettings,
    leaves: Mapping[str, Tensor],
    penalty: Penalty | None,
    by_rows: RowGradients | None,
) -> float:
    """Gradients of one optimiser step; returns its mean response loss.

    Parts are weighted by their response tokens, rows alike.
    """
    count = max(1, sum(part.response_tokens for part in parts))
    losses = []
    for part in parts:
        loss, further = _loss(model, part, settings, count if by_rows is None else max(1, part.response_tokens))
        losses.append(loss.detach())
        (loss + further).backward()
        if by_rows is not None:
            by_rows.take(leaves)
    if by_rows is not None:
        by_rows.give(leaves)
    if penalty is not None:
        penalty(leaves).backward()
    return float(torch.stack(losses).sum()) / (1 if by_rows is None else len(parts)) if losses else 0.0


def _loss(model: GraftedModel, part: Batch, settings: TrainingSettings, count: int) -> tuple[Tensor, Tensor | float]:
    """The response loss of a part, summed and divided by the `count` of tokens, and what is trained on beside it."""
    device = model.base.device
    batch = part.to(device)
    with autocast(settings.precision, device), model.base.logits_at(batch.predicting):
        output = model.base.model(
            input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, output_router_logits=settings.router_aux > 0
        )
    loss = F.cross_entropy(output.logits.float(), batch.targets, reduction="sum") / count
    if settings.router_aux == 0:
        return loss, 0.0
    if getattr(output, "aux_loss", None) is None:
        raise ValueError("training.router_aux: this architecture computes no load-balancing loss of its router; set it to 0")
    return loss, settings.router_aux * output.aux_loss * (part.response_tokens / count)


@contextmanager
def _training(model: GraftedModel, settings: TrainingSettings) -> Iterator[None]:
    """Train mode (dropout) and, if wanted, gradient checkpointing; eval mode afterwards.

    Routers stay in eval mode: some add noise while training, and the frozen experts are to be chosen as they will be in use.
    """
    network: Any = model.base.model
    switch = "activation" if hasattr(network, "activation_checkpointing_enable") else "gradient"  # its name before transformers 5.23
    network.train()
    for site in model.base.sites:
        site.router.eval()
    try:
        if settings.checkpointing:
            getattr(network, f"{switch}_checkpointing_enable")(**{f"{switch}_checkpointing_kwargs": {"use_reentrant": False}})
        yield
    finally:
        if settings.checkpointing:
            getattr(network, f"{switch}_checkpointing_disable")()
        network.eval()


def _moments(optimizer: torch.optim.Optimizer, order: Sequence[str], leaves: Mapping[str, Tensor]) -> dict[str, Tree]:
    kept: dict[str, Tree] = {"exp_avg": {}, "exp_avg_sq": {}, "step": {}}
    for key in order:
        if state := optimizer.state.get(leaves[key]):  # a leaf that never had a gradient has none: an expert that no token reached
            for name, tree in kept.items():
                tree[key] = state[name].detach().clone()
    return kept


def _restore(optimizer: torch.optim.Optimizer, order: Sequence[str], leaves: Mapping[str, Tensor], moments: Mapping[str, Tree]) -> None:
    for key in order:
        if key in moments["step"]:
            devices = {"step": "cpu"}  # where AdamW keeps its count
            optimizer.state[leaves[key]] = {
                name: tree[key].clone().to(devices.get(name, leaves[key].device)) for name, tree in moments.items()
            }
