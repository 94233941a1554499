"""From examples to token rows, and from rows to batches."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgraft.data.example import Example
from fedgraft.data.settings import DataSettings
from fedgraft.data.templates import end_id, prompt_and_lead, token_ids
from fedgraft.seeds import numpy_rng

if TYPE_CHECKING:
    from numpy.random import Generator
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
FEWEST_TOKENS = 1024
"""Below so many a forward takes about as long for fewer tokens, so that padding costs nothing."""
ALIKE = 0.75
"""How long a row must be beside the longest of its batch, above that."""


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of prompt and response; `start` is the index of the first response token. A whole response closes with the end token."""

    ids: list[int]
    start: int


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded rows: `ids`, `mask` (1 for tokens) and `labels` (-100 outside the responses, unshifted), each [B, T] int64."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.mask.sum())

    @property
    def predicting(self) -> Tensor:
        """[B, T] bool: the positions whose next token belongs to a response, which the loss is taken over."""
        chosen = torch.zeros_like(self.labels, dtype=torch.bool)
        chosen[:, :-1] = self.labels[:, 1:] != IGNORED
        return chosen

    @property
    def targets(self) -> Tensor:
        """[N]: the next tokens of the `predicting` positions, in their order."""
        wanted = self.labels[:, 1:]
        return wanted[wanted != IGNORED]

    @property
    def response_tokens(self) -> int:
        """Tokens the loss is taken over: labels that have a token before them."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(*(_moved(tensor, torch.device(device)) for tensor in (self.ids, self.mask, self.labels)))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On a GPU as soon as it needs it: the copy from page-locked memory runs beside what it is still computing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not tensor.is_cuda else tensor.to(device)


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int) -> tuple[Row, bool]:
    """The example as tokens, at most `max_length`, and whether something was cut.

    Cut in this order, each only as far as needed: the context from its end; earlier chat turns, the oldest first (a system turn stays); the
    response from its end, down to a quarter of `max_length`; the instruction from its end. A cut response has no end token.

    Raises:
        ValueError: the template alone leaves no room, or it cannot hold this example.
    """
    whole = _row(example, tokenizer, template)
    if len(whole.ids) <= max_length:
        return whole, False
    response = len(whole.ids) - whole.start
    fitted = _fit(example, tokenizer, template, max_length, response, min(response, max_length // 4))
    row = _row(fitted, tokenizer, template)
    return Row(row.ids[:max_length], row.start), True


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int) -> list[int]:
    """The prompt's tokens for generation, at most `max_length`, cut as in `encode`.

    Equal to the prompt of the training row wherever that row was not cut.
    """
    ids = _prompt(example, tokenizer, template)
    return ids if len(ids) <= max_length else _prompt(_fit(example, tokenizer, template, max_length, 0, 0), tokenizer, template)


def encode_all(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> tuple[list[Row], int]:
    """All examples as rows, and how many of them were cut."""
    encoded = [encode(example, tokenizer, settings.template, settings.max_length) for example in examples]
    return [row for row, _ in encoded], sum(cut for _, cut in encoded)


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """One batch, right-padded to its longest row."""
    shape = (len(rows), max(len(row.ids) for row in rows))
    ids, mask, labels = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    for index, row in enumerate(rows):
        tokens = torch.tensor(row.ids)
        ids[index, : len(tokens)] = tokens
        mask[index, : len(tokens)] = 1
        labels[index, row.start : len(tokens)] = tokens[row.start :]
    return Batch(ids, mask, labels)


def stacked(batches: Sequence[Batch], pad_id: int) -> Batch:
    """The rows of several batches in one, padded to the longest."""
    length = max(batch.ids.shape[1] for batch in batches)

    def joined(tensors: Sequence[Tensor], value: int) -> Tensor:
        return torch.cat([F.pad(tensor, (0, length - tensor.shape[1]), value=value) for tensor in tensors])

    return Batch(
        joined([batch.ids for batch in batches], pad_id),
        joined([batch.mask for batch in batches], 0),
        joined([batch.labels for batch in batches], IGNORED),
    )


def round_rows(count: int, per_round: int, round: int, seed: int, client: str) -> list[int]:
    """Indices of the rows a client trains on in a round (counted from 0).

    They are the positions round * per_round ... of an endless sequence of permutations of its `count` rows, one permutation per epoch: each
    row comes once per epoch, and any round is computed without the earlier ones.
    """
    if count < 1:
        raise ValueError(f"client {client!r} has no training rows")
    positions = range(round * per_round, (round + 1) * per_round)
    epochs = {position // count for position in positions}
    order = {epoch: numpy_rng(seed, "batches", client, epoch).permutation(count) for epoch in epochs}
    return [int(order[position // count][position % count]) for position in positions]


def by_length(rows: Sequence[Row], size: int, rng: Generator) -> list[list[Row]]:
    """The rows in groups of `size` of nearly equal length, the groups in a random order; only the longest rows' may be smaller."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return [groups[int(at)] for at in rng.permutation(len(groups))]


def batches_in_order(rows: Sequence[Row], batch_size: int, pad_id: int) -> Iterator[tuple[list[int], Batch]]:
    """(indices into `rows`, batch) over all rows once, the longest first, so that little is padded and memory peaks at the start."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
    for first in range(0, len(rows), batch_size):
        chosen = order[first : first + batch_size]
        yield chosen, collate([rows[index] for index in chosen], pad_id)


def first_tokens(rows: Iterable[Row], count: int) -> Iterator[Row]:
    """The first rows with `count` tokens in all, the last one cut to that; no more rows are drawn than needed."""
    left = count
    for row in rows:
        yield Row(row.ids[:left], min(row.start, left))
        left -= len(row.ids)
        if left <= 0:
            return


def batches_alike(rows: Sequence[Row], most: int, pad_id: int) -> Iterator[Batch]:
    """All rows once, the longest first and those of like length together, at most `most` tokens with padding in a batch of several rows."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        longest = len(batch[0].ids) if batch else 0
        unlike = len(batch) * longest >= FEWEST_TOKENS and len(row.ids) < ALIKE * longest
        if batch and (unlike or (len(batch) + 1) * longest > most):
            yield collate(batch, pad_id)
            batch = []
        batch.append(row)
    if batch:
        yield collate(batch, pad_id)


def _prompt(example: Example, tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    return token_ids(prompt_and_lead(example, tokenizer, template)[0], tokenizer)


def _row(example: Example, tokenizer: PreTrainedTokenizerBase, template: str) -> Row:
    """Prompt, response and end token.

    The response is tokenised in its place after the prompt, since some tokenizers treat the start of a text specially; where a token would
    span the border it is tokenised alone, since generation starts at that border.
    """
    prompt, lead = prompt_and_lead(example, tokenizer, template)
    before, joined = token_ids(prompt, tokenizer), token_ids(prompt + lead + example.response, tokenizer)
    response = joined[len(before) :] if joined[: len(before)] == before else token_ids(lead + example.response, tokenizer)
    return Row([*before, *response, end_id(tokenizer, template)], len(before))


def _fit(example: Example, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int, wanted: int, least: int) -> Example:
    """The example with its prompt cut to leave room for `wanted` response tokens, or at least for `least` of them."""

    def length(candidate: Example) -> int:
        return len(_prompt(candidate, tokenizer, template))

    bare = replace(example, context="")
    if length(bare) <= max_length - wanted:
        context = _longest(example.context, max_length - wanted, lambda text: length(replace(example, context=text)))
        return replace(example, context=context)
    while length(bare) > max_length - wanted and len(shorter := _drop_oldest(bare.turns)) < len(bare.turns):
        bare = replace(bare, turns=shorter)
    if length(bare) <= max_length - least:
        return bare
    instruction = _longest(bare.instruction, max_length - least, lambda text: length(replace(bare, instruction=text)))
    if not instruction:
        raise ValueError(
            f"row {example.id!r}: max_length {max_length} leaves no room beside the template's own words; raise data.max_length"
        )
    return replace(bare, instruction=instruction)


def _longest(text: str, limit: int, length: Callable[[str], int]) -> str:
    """The longest beginning of a text that `length` finds no longer than `limit`; "" if none is."""

    def measure(characters: int) -> int:
        return length(text[:characters].rstrip())

    characters = bisect_right(range(len(text) + 1), limit, key=measure) - 1
    while characters > 0 and measure(characters) > limit:  # a longer text can have fewer tokens, which the bisection ignores
        characters -= 1
    return text[: max(characters, 0)].rstrip()


def _drop_oldest(turns: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """The turns without the oldest exchange: up to the next user turn; system turns at the front stay."""
    front = next((index for index, (role, _) in enumerate(turns) if role != "system"), len(turns))
    following = next((index for index in range(front + 1, len(turns)) if turns[index][0] == "user"), len(turns))
    return turns[:front] + turns[following:]
