"""What general knowledge a model keeps: its loss on held-out text that no client trains on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgraft.data.general_text import general_texts
from fedgraft.moe.load import Base
from fedgraft.training.fit import autocast

WINDOW = 512
InUse: TypeAlias = Callable[[list[list[int]]], AbstractContextManager[None]]
"""Rows as token ids -> the context in which they are predicted."""


def windows(tokenizer: Any, tokens: int) -> Tensor:
    """[N, WINDOW] windows over the shipped text, N = tokens / WINDOW rounded up, documents taken in turn."""
    wanted = max(1, -(-tokens // WINDOW))
    ids: list[int] = []
    for text in general_texts():
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= wanted * WINDOW:
            break
    count = min(wanted, len(ids) // WINDOW)
    return torch.tensor(ids[: count * WINDOW]).view(count, -1)


@torch.no_grad()
def general_loss(base: Base, tokens: int, precision: str, in_use: InUse = lambda rows: nullcontext()) -> float:
    """Mean nats per token over about `tokens` tokens of general text, of the model that `in_use` makes of the base for some rows of it."""
    losses = []
    for batch in windows(base.tokenizer, tokens).split(8):
        ids = batch.to(base.device)
        with in_use(batch.tolist()), autocast(precision, base.device):
            logits = base.model(input_ids=ids, use_cache=False).logits
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"))
    return float(torch.cat(losses).mean())
