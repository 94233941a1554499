"""One answer in the making: what is wanted, the tokens so far, and the text that is certain by now."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedgraft.use.loaded import Loaded

UNFINISHED_CHARACTER = "\ufffd"  # what a tokenizer shows for bytes that are no whole character yet


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What to answer, and how."""

    client: str
    """The model."""
    prompt: Sequence[int]
    """Tokens, at least one."""
    most: int
    """Tokens of the answer at most."""
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this probability together."""
    seed: int | None = None
    """Equal seeds draw equally; None: by chance."""
    stop: tuple[str, ...] = ()
    """The answer ends before any of these texts."""
    verbatim: bool = False
    """Keep white space around the answer."""


@dataclass(eq=False)
class Answer:
    """The tokens written so far. `reason` is None until it is finished: `stop` at the closing token or a stop text, else `length`."""

    wish: Wish
    written: list[int] = field(default_factory=list)
    reason: Literal["stop", "length"] | None = None
    text: str = ""
    """All of it, once it is finished."""
    _told: str = ""

    def __post_init__(self) -> None:
        seed = int.from_bytes(os.urandom(7)) if self.wish.seed is None else self.wish.seed
        self.rng = torch.Generator().manual_seed(seed % (1 << 63))

    def take(self, token: int, loaded: Loaded) -> None:
        """Write a token, and finish where the answer ends."""
        ended = token == loaded.end_id
        self.written.append(token)
        if ended or self.wish.stop or len(self.written) == self.wish.most:
            text = self._decoded(loaded)
            found = [at for stop in self.wish.stop if (at := text.find(stop)) >= 0]
            if ended or found:
                self.reason = "stop"
            elif len(self.written) == self.wish.most:
                self.reason = "length"
            if self.reason:
                text = text[: min(found)] if found else text
                self.text = text if self.wish.verbatim else text.strip()

    def news(self, loaded: Loaded) -> str:
        """The text that has become certain since the last call; together they are `text`."""
        if self.reason is None:
            text = self._decoded(loaded)
            text = text[: len(text) - self._uncertain(text)]
            text = text if self.wish.verbatim else text.strip()
        else:
            text = self.text
        if not text.startswith(self._told):  # a tokenizer that tidies up what it has shown
            return "" if self.reason is None else text[len(self._told) :]
        fresh, self._told = text[len(self._told) :], text
        return fresh

    def _decoded(self, loaded: Loaded) -> str:
        return str(loaded.tokenizer.decode(self.written, skip_special_tokens=True))

    def _uncertain(self, text: str) -> int:
        """Characters at the end that may yet change, or turn out to begin a stop text."""
        broken = len(text) - len(text.rstrip(UNFINISHED_CHARACTER))
        begun = [size for stop in self.wish.stop for size in range(1, len(stop)) if text.endswith(stop[:size])]
        return max([broken, *begun])


def next_tokens(logits: Tensor, answers: Sequence[Answer]) -> list[int]:
    """The next token of every answer from its logits [B, V]; each draws from its own stream, so its company has no part in it."""
    found: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, answer in enumerate(answers) if answer.wish.temperature > 0]
    if drawn:
        heat = logits.new_tensor([answers[row].wish.temperature for row in drawn], dtype=torch.float32)[:, None]
        share = logits.new_tensor([answers[row].wish.top_p for row in drawn], dtype=torch.float32)[:, None]
        odds, order = torch.softmax(logits[drawn].float() / heat, -1).sort(-1, descending=True)
        reached = odds.cumsum(-1)
        kept = ((reached - odds) < share).sum(-1, keepdim=True)  # the first one always
        dice = torch.stack([torch.rand(1, generator=answers[row].rng) for row in drawn]).to(logits.device)
        place = torch.searchsorted(reached, dice * reached.gather(-1, kept - 1)).minimum(kept - 1)
        for row, token in zip(drawn, order.gather(-1, place)[:, 0].tolist(), strict=True):
            found[row] = token
    return found
