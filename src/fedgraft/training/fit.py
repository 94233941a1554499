"""The only training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgraft import seeds
from fedgraft.data.batches import Batch
from fedgraft.grafts.graft import Experts, GraftedModel
from fedgraft.moe.sixteen_bit import faster_on_cpu
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
class Use:
    """What the passes of one call of `fit` run with."""

    model: GraftedModel
    tree: Tree
    """All leaves in use, where their layers compute."""
    experts: Experts
    settings: TrainingSettings
    seed: int

    @property
    def compact(self) -> bool:
        """Whether MoE layers are spared what has no part in the loss; the load-balancing loss of a router is one over all tokens."""
        return self.settings.router_aux == 0 and self.model.base.compacts


Gradients: TypeAlias = Callable[[Sequence[Batch]], float]
"""The batches of one optimiser step -> its mean response loss; adds its gradients to the leaves in use. Parts weigh by response tokens."""
Passes: TypeAlias = Callable[[Use], AbstractContextManager[Gradients]]
"""How the forward and backward passes of a call of `fit` are run: `alone`, or with those of other clients (`training.cohort`)."""


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
    passes: Passes | None = None,
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
        passes: how forward and backward are run; None: `alone`.
        by_rows: every part is one row, and all rows count the same; a step may have none.

    Raises:
        NotFiniteError: the loss or its gradient is not finite; nothing is returned, so the caller's leaves stand.
    """
    leaves = {key: leaf.requires_grad_() for key, leaf in model.placed(clone(trained)).items()}
    order = sorted(leaves)
    optimizer = torch.optim.AdamW([leaves[key] for key in order], lr=lr, weight_decay=settings.weight_decay, fused=True)
    if moments:
        _restore(optimizer, order, leaves, moments)
    began, total, tokens = time.perf_counter(), 0.0, 0
    use = Use(model=model, tree=model.placed(combine(leaves, fixed or {})), experts=experts, settings=settings, seed=seed)
    with (passes or alone)(use) as gradients:
        for done, parts in enumerate(steps, start=1):
            loss = gradients(parts) if by_rows is None else _of_rows(gradients, parts, leaves, by_rows)
            if penalty is not None:
                penalty(leaves).backward()
            if on_gradients is not None:
                on_gradients(leaves)
            norm = float(torch.nn.utils.clip_grad_norm_([leaves[key] for key in order], settings.clip, foreach=True))
            _check_finite(loss, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total, tokens = total + loss, tokens + sum(part.tokens for part in parts)
            report(done, len(steps), loss)
    kept = _moments(optimizer, order, leaves) if settings.optimizer_state == "kept" else {}
    return Fit(tree=clone(leaves), loss=total / len(steps), tokens=tokens, seconds=time.perf_counter() - began, moments=kept)


def _of_rows(gradients: Gradients, rows: Sequence[Batch], leaves: Mapping[str, Tensor], by_rows: RowGradients) -> float:
    """The gradients of a step from those of its rows, each by itself; gives the mean of their losses."""
    losses = []
    for row in rows:
        losses.append(gradients([row]))
        by_rows.take(leaves)
    by_rows.give(leaves)
    return sum(losses) / max(1, len(losses))


def _check_finite(loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NotFiniteError(f"the loss became {loss} (gradient norm {norm}); lower training.lr, or check the data and the base model")


def autocast(precision: str, device: torch.device) -> Any:
    """The autocast context of a precision setting."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def sparing(model: GraftedModel, batch: Batch, compact: bool) -> AbstractContextManager[None]:
    """Forward and backward of a batch; if `compact`, MoE layers are spared the padding, and the last one what has no part in the loss."""
    return model.base.without_padding(batch.mask, batch.predicting) if compact else nullcontext()


@contextmanager
def alone(use: Use) -> Iterator[Gradients]:
    """One client's passes by themselves."""
    compact = use.compact  # found out before anything is in training mode
    with training_mode(use.model, use.settings), seeds.torch_default(use.seed), use.model.using(use.tree, use.experts):
        yield partial(_gradients, use.model, use.settings, compact)


def _gradients(model: GraftedModel, settings: TrainingSettings, compact: bool, parts: Sequence[Batch]) -> float:
    count = max(1, sum(part.response_tokens for part in parts))
    device = model.base.device
    losses = []
    for part in parts:
        batch = part.to(device)
        with sparing(model, batch, compact):
            with autocast(settings.precision, device), model.base.logits_at(batch.predicting):
                output = model.base.model(
                    input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, output_router_logits=settings.router_aux > 0
                )
            loss = F.cross_entropy(output.logits.float(), batch.targets, reduction="sum") / count
            losses.append(loss.detach())
            if settings.router_aux > 0:
                if getattr(output, "aux_loss", None) is None:
                    raise ValueError("training.router_aux: this architecture computes no load-balancing loss of its router; set it to 0")
                loss = loss + settings.router_aux * output.aux_loss * (part.response_tokens / count)
            loss.backward()
    return float(torch.stack(losses).sum())


@contextmanager
def training_mode(model: GraftedModel, settings: TrainingSettings) -> Iterator[None]:
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
        with faster_on_cpu():
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
