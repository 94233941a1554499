"""The text that a client's experts are judged on, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from fedgraft import seeds
from fedgraft.data.batches import Batch, Row, batches_alike, first_tokens
from fedgraft.data.example import Example
from fedgraft.data.general_text import calibration_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FULL_ROWS = 8
"""Rows of full length in a batch."""


def own_rows(examples: Sequence[Example], row: Callable[[Example], Row], seed: int, client: str) -> Iterator[Row]:
    """A client's prompts and responses in a random order of its own."""
    for index in seeds.numpy_rng(seed, "calibration", client).permutation(len(examples)):
        yield row(examples[int(index)])


def generic_rows(tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> Iterator[Row]:
    """The shipped documents in an order that is the same for every client, cut into rows."""
    texts = calibration_texts()
    for index in seeds.numpy_rng(seed, "calibration").permutation(len(texts)):
        ids = tokenizer(texts[int(index)], add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids), length):
            yield Row(ids[start : start + length], start=0)


def in_batches(rows: Iterable[Row], budget: int, length: int, pad_id: int) -> Iterator[Batch]:
    """The first `budget` tokens of rows of at most `length`, those of like length together."""
    yield from batches_alike(list(first_tokens(rows, budget)), FULL_ROWS * length, pad_id)
