"""The clients' training rows as a run would see them: how long, how many cut, how much of them is response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedgraft.data.batches import encode
from fedgraft.data.partition import ClientData
from fedgraft.data.settings import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEEN = 64
"""Training rows per client that are tokenised; they come in random order, so the first will do."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of one client."""

    client: str
    train: int
    validation: int
    test: int
    seen: int
    """Training rows that were tokenised."""
    cut: int
    """Of those, how many `data.max_length` cut."""
    tokens: float
    """Mean length of those, in tokens."""
    padded: float
    """Mean length when those are padded to the longest of their batch."""
    longest: int
    response: float
    """Share of their tokens that are response."""


def look_at_rows(
    client: ClientData, settings: DataSettings, tokenizer: PreTrainedTokenizerBase | None, *, batch: int, most: int = SEEN
) -> Rows:
    """Tokenise at most `most` training rows, none without a tokenizer; `batch` rows are padded together.

    Raises:
        ValueError: as `encode`.
    """
    chosen = client.train[:most] if tokenizer is not None else []
    lengths: list[int] = []
    starts, cut = [], 0
    for example in chosen:
        assert tokenizer is not None
        row, shortened = encode(example, tokenizer, settings.template, settings.max_length)
        lengths.append(len(row.ids))
        starts.append(row.start)
        cut += shortened
    groups = [lengths[at : at + batch] for at in range(0, len(lengths), batch)]
    return Rows(
        client=client.name,
        train=len(client.train),
        validation=len(client.validation),
        test=len(client.test),
        seen=len(chosen),
        cut=cut,
        tokens=sum(lengths) / max(1, len(lengths)),
        padded=sum(max(group) * len(group) for group in groups) / max(1, len(lengths)),
        longest=max(lengths, default=0),
        response=1 - sum(starts) / sum(lengths) if lengths else 1.0,
    )


def response_share(rows: Sequence[Rows]) -> float:
    """Share of all seen tokens that are response; 1 when none was seen."""
    total = sum(one.seen * one.tokens for one in rows)
    return sum(one.seen * one.tokens * one.response for one in rows) / total if total else 1.0
