"""A base larger than memory, for forwards that may wait for each other: all batches pass decoder layer l before any reaches layer l + 1.

Every batch runs the model's own forward in a thread of its own, of which only one runs at a time and which stops wherever a decoder layer
is called. So whatever a family does between its layers is done by the family, and nothing here knows of masks, positions or residuals.
A layer's weights are read once, when all batches stand before it, the layer is run for one batch after another, and its weights are
dropped. What is computed for a batch is what a forward of the whole model computes, bit for bit.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgraft.moe.family import anatomy_of
from fedgraft.moe.layer_weights import OUTSIDE, LayerWeights
from fedgraft.moe.load import Base, checkpoint_of, digest_of, naming, tokenizer_of
from fedgraft.moe.memory import check_layered_room, layered_bytes
from fedgraft.moe.plan import examine, file_notes
from fedgraft.moe.settings import ModelSettings
from fedgraft.moe.site import first_output, with_hidden
from fedgraft.turns import Turns


@dataclass(frozen=True)
class Call:
    """A decoder layer that a forward has come to."""

    number: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Forward = Turns[Call, Any, None]


@dataclass(frozen=True)
class Layered:
    """A base without its decoder layers, and where they come from."""

    base: Base
    """Names, tokenizer and MoE layers as of a loaded base. Weights of a layer are there while `in_step` is at it."""
    weights: LayerWeights

    def in_step(
        self,
        batches: Sequence[tuple[Tensor, Tensor]],
        at: Callable[[int], None],
        passed: Callable[[int, int], None] = lambda done, total: None,
        spill: Path | None = None,
    ) -> None:
        """Send every batch (ids [B, T], mask [B, T]) through the decoder, layer by layer, up to the last MoE layer.

        Args:
            batches: all of them; their hidden states are kept, in memory or in `spill`.
            at: called with a batch's position before each decoder layer that it passes; what it raises ends everything.
            passed: called with (decoder layers done, all of them) at the start and after each.
            spill: an existing folder for hidden states, memory-mapped, in the place of memory.

        Raises:
            ValueError: weights are missing, or the model does not run its decoder layers once each, one after another.
        """
        last = max(site.layer for site in self.base.sites)
        keep = partial(_mapped, spill) if spill is not None else _as_it_is
        with self._stopping(keep) as begin:
            forwards = [begin(*batch) for batch in batches]
            try:
                passed(0, last + 1)
                for forward in forwards:
                    forward.go_on(None)
                for number in range(last + 1):
                    self._layer(number, forwards, at, keep, goes_on=number < last)
                    passed(number + 1, last + 1)
            finally:
                for forward in forwards:
                    forward.leave()

    def _layer(self, number: int, forwards: Sequence[Forward], at: Callable[[int], None], keep: Any, goes_on: bool) -> None:
        layer = self.weights.layers[number]
        try:
            self.weights.put(number)
            for position, forward in enumerate(forwards):
                call = forward.said
                if call is None or call.number != number:
                    raise ValueError(
                        f"{self.weights.path}.{number}: {self.base.model.config.model_type} does not run its decoder layers once each, one "
                        "after another, so they can't be read one at a time"
                    )
                at(position)
                with torch.no_grad():
                    output = keep(type(layer).forward(layer, *call.args, **call.kwargs))
                del call  # with the layer's inputs
                if goes_on:
                    forward.go_on(output)
                else:
                    forward.leave()
                del output
        finally:
            self.weights.drop(number)

    @contextmanager
    def _stopping(self, keep: Callable[[Any], Any]) -> Iterator[Callable[[Tensor, Tensor], Forward]]:
        """Forwards begun inside the block stop at every decoder layer."""
        say = threading.local()
        decoder = self.base.model.base_model

        def run(ids: Tensor, mask: Tensor, stop: Callable[[Call], Any]) -> None:
            say.stop = stop
            with torch.no_grad():
                decoder(input_ids=ids, attention_mask=mask, use_cache=False)

        def stand_in(number: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: say.stop(Call(number, args, kwargs))

        embedded = self.base.model.get_input_embeddings().register_forward_hook(lambda module, args, output: keep(output))
        for number, layer in enumerate(self.weights.layers):
            layer.forward = stand_in(number)
        try:
            yield lambda ids, mask: Turns(partial(run, ids, mask), "layered")
        finally:
            embedded.remove()
            for layer in self.weights.layers:
                del layer.forward


def open_layered(settings: ModelSettings) -> Layered:
    """Prepare a base of which one decoder layer is in memory at a time; embeddings are read at once.

    Where the weights go is `settings.target()`; `device_map`, `max_memory`, `offload` and `quantise` are for a base that is loaded whole
    and change nothing here.

    Raises:
        ValueError: as `load_base`, weights that are packed, or a machine without room for one layer.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    settings = settings.model_copy(update={"device_map": None, "max_memory": None, "offload": None, "quantise": "none"})
    plan = examine(settings)
    with naming(settings):
        if plan.architecture.quantisation is not None:
            raise ValueError("its weights are packed, and unpacking takes the whole model; choose experts in a run that loads it")
    checkpoint = checkpoint_of(settings, plan)
    with naming(settings):
        device = settings.target()
        weights = LayerWeights(plan, checkpoint, device)
        check_layered_room(layered_bytes(plan.skeleton), plan.room)
        weights.put(OUTSIDE)
        tokenizer = tokenizer_of(checkpoint.folder, plan.architecture)
    notes = (*plan.notes, *file_notes(settings, checkpoint))
    anatomy, digest = anatomy_of(weights.model), digest_of(settings, plan, checkpoint)
    return Layered(Base(name=settings.name, tokenizer=tokenizer, digest=digest, notes=notes, **vars(anatomy)), weights)


def _as_it_is(output: Any) -> Any:
    return output


def _mapped(folder: Path, output: Any) -> Any:
    """A layer's output with its hidden states in a file of their own, which lasts as long as they do and which the system may page out."""
    hidden = first_output(output)
    handle, name = tempfile.mkstemp(dir=folder)
    os.close(handle)
    there = torch.from_file(name, shared=True, size=hidden.numel(), dtype=hidden.dtype).view(hidden.shape)
    there.copy_(hidden)
    with suppress(PermissionError):  # Windows lets no file go that is mapped; the folder's owner removes it
        os.unlink(name)
    return with_hidden(output, there)
