"""The text that a client's experts are judged on, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from fedgraft import seeds
from fedgraft.data.batches import Batch, Row, collate
from fedgraft.data.example import Example
from fedgraft.data.general_text import calibration_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 8


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


def in_batches(rows: Iterator[Row], pad_id: int, size: int = BATCH) -> Iterator[Batch]:
    """So many rows together, as they come."""
    while part := list(islice(rows, size)):
        yield collate(part, pad_id)
