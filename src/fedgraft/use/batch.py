"""Answers of several models at once: one batch over the shared base, whose rows come and go between its steps."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgraft.use.answer import Answer, next_tokens

if TYPE_CHECKING:
    from fedgraft.use.loaded import Loaded


JOINING = {"DynamicLayer"}
PADDED = {*JOINING, "DynamicSlidingWindowLayer", "DummyLayer", "LinearAttentionLayer"}
PADDED |= {f"LinearAttentionAnd{kind}AttentionLayer" for kind in ("Full", "SlidingWindow")}
"""Kinds of cache layers of transformers that new rows can join in the middle, and those whose rows can be padded on the left and leave."""


class Batch:
    """Answers being written, one token each in a step.

    Rows are padded on the left, so all of them end in the same column of the cache. Not thread-safe; between its calls the model is free.
    """

    def __init__(self, loaded: Loaded, most: int = 32) -> None:
        """An empty batch of at most so many rows; a forward shows what the model's cache allows."""
        self.loaded, self.answers = loaded, list[Answer]()
        self._cache: Any = None
        self._lengths: list[int] = []
        """Tokens of each row in the cache."""
        taken = inspect.signature(loaded.model.forward).parameters
        self._taken = taken.keys() & {"position_ids", "logits_to_keep"}

        with torch.no_grad():
            cache = loaded.model(torch.zeros(1, 2, dtype=torch.long, device=loaded.grafted.base.device), use_cache=True).past_key_values
        kinds = {type(layer).__name__ for layer in cache.layers} if type(cache).__name__ == "DynamicCache" else {type(cache).__name__}
        self._joining, self._most = kinds <= JOINING, most if kinds <= PADDED else 1

    @property
    def room(self) -> int:
        """How many answers can join now: into a batch that has begun only where the cache is that of ordinary attention."""
        return self._most - len(self.answers) if self._joining or not self.answers else 0

    def join(self, answers: Sequence[Answer]) -> None:
        """Read the prompts of these answers and write their first tokens."""
        assert 0 < len(answers) <= self.room
        lengths = [len(answer.wish.prompt) for answer in answers]
        width = max(lengths)
        ids = torch.full((len(answers), width), self.loaded.grafted.base.pad_id)
        for row, answer in enumerate(answers):
            ids[row, width - lengths[row] :] = torch.tensor(list(answer.wish.prompt))
        places = (torch.arange(width) - width + torch.tensor(lengths)[:, None]).clamp(min=0)
        cache = self._write(answers, ids, places, lengths, None)
        self._cache = cache if not self.answers else self._merged(cache, width)
        self.answers += answers
        self._lengths += lengths

    def step(self) -> None:
        """Write one more token of every answer."""
        ids = torch.tensor([[answer.written[-1]] for answer in self.answers])
        places = torch.tensor(self._lengths)[:, None]
        self._lengths = [length + 1 for length in self._lengths]
        self._cache = self._write(self.answers, ids, places, self._lengths, self._cache)

    def leave(self, leaving: Sequence[Answer]) -> None:
        """Go on without these answers, in any state."""
        gone = {id(answer) for answer in leaving}
        kept = [row for row, answer in enumerate(self.answers) if id(answer) not in gone]
        if len(kept) == len(self.answers):
            return
        if kept:
            before = max(self._lengths)
            self._cache.reorder_cache(torch.tensor(kept))
            self._lengths = [self._lengths[row] for row in kept]
            if self._joining:
                _resized(self._cache, max(self._lengths) - before)
        else:
            self._cache, self._lengths = None, []
        self.answers = [self.answers[row] for row in kept]

    @torch.no_grad()
    def _write(self, answers: Sequence[Answer], ids: Tensor, places: Tensor, lengths: Sequence[int], cache: Any) -> Any:
        """One forward for ids [B, n] at their places in each row [B, n]; every answer takes its next token. Returns the cache."""
        device, width = self.loaded.grafted.base.device, max(lengths)
        options: dict[str, Any] = {"position_ids": places.to(device), "logits_to_keep": 1}
        mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
        with self.loaded.rows([answer.wish.client for answer in answers]) as model:
            output = model(
                input_ids=ids.to(device),
                attention_mask=None if mask.all() else mask.long().to(device),
                past_key_values=cache,
                use_cache=True,
                **{name: options[name] for name in self._taken},
            )
        for answer, token in zip(answers, next_tokens(output.logits[:, -1], answers), strict=True):
            answer.take(token, self.loaded)
        return output.past_key_values

    def _merged(self, cache: Any, width: int) -> Any:
        """The rows of another cache below those of this one; the narrower one is padded on the left."""
        wider = max(width, *self._lengths)
        _resized(self._cache, wider - max(self._lengths))
        _resized(cache, wider - width)
        for own, other in zip(self._cache.layers, cache.layers, strict=True):
            if other.is_initialized:
                own.keys, own.values = torch.cat([own.keys, other.keys]), torch.cat([own.values, other.values])
        return self._cache


def _resized(cache: Any, more: int) -> None:
    """Add columns on the left, or take them away."""
    for layer in cache.layers if more else ():
        if layer.is_initialized:
            layer.keys, layer.values = (F.pad(part, (0, 0, more, 0)) for part in (layer.keys, layer.values))
