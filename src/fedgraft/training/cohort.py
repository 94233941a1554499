"""Several clients trained at once: one forward and backward through the frozen base for the batches of all of them.

Whatever a method does on a client runs as it is, in threads of which only one runs at a time. Where a client wants the gradients of an
optimiser step it hands over and waits; when all wait, their batches go through the model together, each client's leaves on its own rows
(`grafts.lanes`), and every client goes on with its own gradients. Rows do not mix, so results equal those of one client after another
to rounding, and a client whose numbers are not finite harms no other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from fedgraft.data.batches import Batch, stacked
from fedgraft.grafts.graft import Fitted, GraftedModel
from fedgraft.grafts.lanes import Draws, Lane
from fedgraft.training.fit import Gradients, NotFiniteError, Passes, Use, autocast, sparing, training_mode
from fedgraft.training.settings import TrainingSettings

T = TypeVar("T")


class Abandoned(BaseException):
    """The cohort is given up; raised where a client waits."""


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


class Member(Generic[T]):
    """One client's work in a thread of its own, which runs only while `go_on` waits for it."""

    def __init__(self, work: Callable[[Passes], T]) -> None:
        """Prepare it; `work` is called with the passes to train with."""
        self.step: Step | None = None
        self._work = work
        self._losses, self._said = SimpleQueue[float | None](), SimpleQueue[Step | None]()
        self._running = self._ended = False
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="cohort", daemon=True)
        self._thread.start()

    def go_on(self, loss: float | None = 0.0) -> None:
        """Let it run with the loss of its step to its next one (then `step` is that) or to its end (then None).

        Raises:
            BaseException: whatever it raised, but for `NotFiniteError`.
        """
        self._hand_over(loss)
        if self._error is not None and not isinstance(self._error, NotFiniteError):
            raise self._error

    def result(self) -> T | NotFiniteError:
        """What it returned, or why it could not train."""
        if isinstance(self._error, NotFiniteError):
            return self._error
        return self._result[0]

    def leave(self) -> None:
        """End the thread, wherever it is."""
        if self._running:  # the caller was interrupted while it waited
            self._listen()
        while not self._ended:
            self._hand_over(None)
        self._thread.join()

    def _hand_over(self, loss: float | None) -> None:
        self._running = True
        self._losses.put(loss)
        self._listen()

    def _listen(self) -> None:
        self.step = self._said.get()
        self._running, self._ended = False, self.step is None

    def _run(self) -> None:
        try:
            self._wait()
            self._result.append(self._work(self._passes))
        except BaseException as error:
            self._error = error
        self._said.put(None)

    def _wait(self) -> float:
        loss = self._losses.get()
        if loss is None:
            raise Abandoned
        return loss

    @contextmanager
    def _passes(self, use: Use) -> Iterator[Gradients]:
        draws, fitted = Draws(use.seed, repeats=use.settings.checkpointing), use.model.fitted(use.tree, use.experts)
        compact = use.compact

        def gradients(parts: Sequence[Batch]) -> float:
            self._said.put(Step(use=use, fitted=fitted, compact=compact, draws=draws, parts=parts))
            return self._wait()

        yield gradients


def together(works: Sequence[Callable[[Passes], T]]) -> list[T | NotFiniteError]:
    """Do several clients' work in step, each as `work(passes)`; gives their results, in order.

    Those that end early leave the cohort, the others go on.
    """
    members = [Member(work) for work in works]
    try:
        for member in members:
            member.go_on()
        while waiting := [(member, member.step) for member in members if member.step is not None]:
            for (member, _), loss in zip(waiting, _joint([step for _, step in waiting]), strict=True):
                member.go_on(loss)
    finally:
        for member in members:
            member.leave()
    return [member.result() for member in members]


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
