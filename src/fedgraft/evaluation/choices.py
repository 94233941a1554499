"""Which option of a multiple-choice question a model finds likeliest, as lm-eval measures it; and both ways' figures of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedgraft.evaluation.tasks import Question, Task
from fedgraft.moe.load import Base
from fedgraft.training.fit import autocast

DELIMITER = " "
"""Between prompt and option."""
InUse: TypeAlias = Callable[[list[list[int]]], AbstractContextManager[None]]
"""The prompts of a batch's rows as token ids -> the context in which these rows are predicted."""


def as_it_stands(prompts: list[list[int]]) -> AbstractContextManager[None]:
    """The model that is in use already."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Judged:
    """What a model makes of a question: log-likelihood (nats, summed over its tokens) of each option."""

    question: Question
    likelihoods: tuple[float, ...]

    @property
    def choice(self) -> int:
        """The likeliest option; of equals the first."""
        return max(range(len(self.likelihoods)), key=lambda index: self.likelihoods[index])

    @property
    def choice_by_length(self) -> int:
        """The option that is likeliest per character."""
        lengths = [len(option) for option in self.question.options]
        return max(range(len(lengths)), key=lambda index: self.likelihoods[index] / lengths[index])


def accuracy(judged: Sequence[Judged], lettered: bool) -> dict[str, float]:
    """lm-eval's metrics: `acc` in [0, 1]; where options differ in length also `acc_norm`, for which length doesn't count."""
    count = max(1, len(judged))
    right = {"acc": sum(one.choice == one.question.answer for one in judged) / count}
    if not lettered:
        right["acc_norm"] = sum(one.choice_by_length == one.question.answer for one in judged) / count
    return right


@torch.no_grad()
def judge(base: Base, task: Task, batch_size: int, precision: str, in_use: InUse = as_it_stands) -> list[Judged]:
    """Ask the model that `in_use` makes of the base; options that differ in their last token only share a forward.

    A prompt that is too long for the model loses its beginning.
    """
    pairs = [_encode(base, question.prompt, DELIMITER + option) for question in task.questions for option in question.options]
    wanted: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for at, (ids, start) in enumerate(pairs):
        wanted.setdefault((ids[:-1], start), []).append(at)
    order = sorted(wanted, key=lambda key: -len(key[0]))
    likelihoods = [0.0] * len(pairs)
    for first in range(0, len(order), batch_size):
        chunk = order[first : first + batch_size]
        with in_use([list(ids[:start]) for ids, start in chunk]):
            found = _log_probabilities(base, chunk, precision)
        for key, logs in zip(chunk, found, strict=True):
            for at in wanted[key]:
                ids, start = pairs[at]
                likelihoods[at] = float(logs.gather(-1, torch.tensor(ids[start:]).to(logs.device)[:, None]).sum())
    judged, begin = [], 0
    for question in task.questions:
        judged.append(Judged(question, tuple(likelihoods[begin : begin + len(question.options)])))
        begin += len(question.options)
    return judged


def _encode(base: Base, prompt: str, option: str) -> tuple[tuple[int, ...], int]:
    """Token ids of both, and the index of the option's first token; the tokenizer adds what it adds to any text."""
    before, whole = (list(base.tokenizer(text)["input_ids"]) for text in (prompt, prompt + option))
    start = len(before)
    if len(whole) <= start:  # a tokenizer that ends texts with a token, or merges over the border
        raise ValueError(f"model.name {base.name!r}: its tokenizer leaves no token to the option {option.strip()!r} after a prompt")
    most = getattr(base.model.config.get_text_config(), "max_position_embeddings", None) or len(whole)
    cut = max(0, len(whole) - 1 - most)
    return tuple(whole[cut:]), start - cut


def _log_probabilities(base: Base, chunk: Sequence[tuple[tuple[int, ...], int]], precision: str) -> list[Tensor]:
    """[tokens of the option, V] for each (ids without the last, index of the option's first token)."""
    width = max(len(ids) for ids, _ in chunk)
    inputs, mask = torch.full((len(chunk), width), base.pad_id), torch.zeros((len(chunk), width), dtype=torch.int64)
    chosen = torch.zeros((len(chunk), width), dtype=torch.bool)
    for row, (ids, start) in enumerate(chunk):
        inputs[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
        chosen[row, start - 1 : len(ids)] = True
    options: dict[str, Any] = {"attention_mask": mask.to(base.device), "use_cache": False}
    with autocast(precision, base.device), base.logits_at(chosen.to(base.device)):
        logits = base.model(input_ids=inputs.to(base.device), **options).logits
    return list(logits.float().log_softmax(-1).split(chosen.sum(-1).tolist()))
