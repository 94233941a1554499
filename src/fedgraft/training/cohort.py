"""Several clients trained at once: one forward and backward through the frozen base for the batches of all of them.

Whatever a method does on a client runs as it is, in threads of which only one runs at a time. Where a client wants the gradients of an
optimiser step it hands over and waits; when all wait, their batches go through the model together, each client's leaves on its own rows
(`grafts.lanes`), and every client goes on with its own gradients. Rows do not mix, so results equal those of one client after another
to rounding, and a client whose numbers are not finite harms no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from fedgraft.data.batches import Batch, stacked
from fedgraft.grafts.graft import Fitted, GraftedModel
from fedgraft.grafts.lanes import Draws, Lane
from fedgraft.training.fit import Gradients, NotFiniteError, Passes, Use, autocast, sparing, training_mode
from fedgraft.training.settings import TrainingSettings
from fedgraft.turns import Turns

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Step:
    """An optimiser step whose gradients a client waits for."""

    use: Use
    fitted: Fitted
    """Its leaves at their places."""
    compact: bool
    draws: Draws
    parts: Sequence[Batch]

    @property
    def response_tokens(self) -> int:
        """Tokens its loss is a mean over, 1 at least."""
        return max(1, sum(part.response_tokens for part in self.parts))


class Member(Turns[Step, float, T]):
    """One client's work; it hands over its steps and is answered with their losses."""

    def __init__(self, work: Callable[[Passes], T]) -> None:
        """Prepare it; `work` is called with the passes to train with."""
        super().__init__(lambda hand_over: work(partial(_passes, hand_over)), "cohort")

    def go_on(self, heard: float = 0.0) -> None:
        """Let it run with the loss of its step to its next one or to its end.

        Raises:
            BaseException: whatever it raised, but for `NotFiniteError`.
        """
        with suppress(NotFiniteError):
            super().go_on(heard)

    def outcome(self) -> T | NotFiniteError:
        """What it returned, or why it could not train."""
        return self.error if isinstance(self.error, NotFiniteError) else self.result()


@contextmanager
def _passes(hand_over: Callable[[Step], float], use: Use) -> Iterator[Gradients]:
    draws, fitted = Draws(use.seed, repeats=use.settings.checkpointing), use.model.fitted(use.tree, use.experts)
    compact = use.compact
    yield lambda parts: hand_over(Step(use=use, fitted=fitted, compact=compact, draws=draws, parts=parts))


def together(works: Sequence[Callable[[Passes], T]]) -> list[T | NotFiniteError]:
    """Do several clients' work in step, each as `work(passes)`; gives their results, in order.

    Those that end early leave the cohort, the others go on.
    """
    members = [Member(work) for work in works]
    try:
        for member in members:
            member.go_on()
        while waiting := [(member, member.said) for member in members if member.said is not None]:
            for (member, _), loss in zip(waiting, _joint([step for _, step in waiting]), strict=True):
                member.go_on(loss)
    finally:
        for member in members:
            member.leave()
    return [member.outcome() for member in members]


def obstacle(model: GraftedModel, training: TrainingSettings) -> str:
    """Why clients cannot share a forward of this model, "" if they can: what mixes rows, or has no lanes."""
    config: Any = model.base.model.config.get_text_config()
    dropout = [name for name, value in vars(config).items() if ("dropout" in name or name.endswith("pdrop")) and _positive(value)]
    modules = [
        name for name, module in model.base.model.named_modules() if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    ]
    scaling: Any = getattr(config, "rope_parameters", None)
    kinds = {part.get("rope_type") for part in (scaling, *_dictionaries(scaling)) if isinstance(part, Mapping)}
    for applies, reason in (
        (training.router_aux > 0, "training.router_aux is a loss over all rows of a batch"),
        ("router" in model.lora_settings.targets, "lora.targets has 'router', whose rows a forward holds once"),
        ("experts" in model.lora_settings.targets, "lora.targets has 'experts', which are dispatched for one client"),
        (bool(dropout or modules), f"the base model has dropout of its own ({', '.join([*dropout, *modules][:1])})"),
        (bool(kinds & {"dynamic", "longrope"}), "the base model's rotary positions depend on the longest row of a batch"),
    ):
        if applies:
            return reason
    return ""


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _dictionaries(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else []


def _joint(steps: Sequence[Step]) -> list[float]:
    """Gradients of all steps, each in its own leaves, and their mean response losses."""
    model, settings = steps[0].use.model, steps[0].use.settings
    assert all(step.use.model is model for step in steps)
    losses = [0.0] * len(steps)
    with training_mode(model, settings), torch.random.fork_rng():
        for number in range(max(len(step.parts) for step in steps)):
            present = [at for at, step in enumerate(steps) if number < len(step.parts)]
            for at, loss in zip(present, _part([steps[at] for at in present], number), strict=True):
                losses[at] += loss
    return losses


def _part(steps: Sequence[Step], number: int) -> list[float]:
    """One accumulation part of every step."""
    model, settings = steps[0].use.model, steps[0].use.settings
    device, parts = model.base.device, [step.parts[number] for step in steps]
    batch = stacked(parts, model.base.pad_id).to(device)
    with model.using_lanes(list(_lanes(steps, parts))), sparing(model, batch, steps[0].compact):
        with autocast(settings.precision, device), model.base.logits_at(batch.predicting):
            logits = model.base.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        each = F.cross_entropy(logits.float(), batch.targets, reduction="none").split([part.response_tokens for part in parts])
        counts = torch.tensor([step.response_tokens for step in steps], device=device)
        losses = torch.stack([tokens.sum() for tokens in each]) / counts
        losses.sum().backward()
    return [float(loss) for loss in losses.detach().cpu()]


def _lanes(steps: Sequence[Step], parts: Sequence[Batch]) -> Iterator[Lane]:
    for step, part in zip(steps, parts, strict=True):
        rows, length = part.ids.shape
        step.draws.begin()
        counts = (part.tokens, part.response_tokens)
        yield Lane(fitted=step.fitted, rows=rows, length=length, counts=counts, draws=step.draws)
