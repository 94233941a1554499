"""Answers that a model writes, and how near they come to the responses; answers it chooses from several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedgraft import plugins
from fedgraft.data.batches import Row, encode, prompt_ids
from fedgraft.data.example import Example
from fedgraft.data.scoring import METRICS, same_answer
from fedgraft.data.templates import end_id
from fedgraft.evaluation.response import predicting, row_sums
from fedgraft.evaluation.settings import EvaluationSettings
from fedgraft.methods.method import Prediction
from fedgraft.moe.load import Base
from fedgraft.training.client import Client
from fedgraft.training.fit import autocast

RowScores = dict[str, list[float | None]]
"""Figure -> its value for every row; None where the row is not judged by it."""


def answer_scores(client: Client, model: Prediction, examples: Sequence[Example], settings: EvaluationSettings) -> RowScores:
    """Figures of greedy answers.

    `rougeL` is ROUGE-L F1 (rouge-score, stemmer) in percent; `exact_match`, 1 or 0, is for rows that ask for it or whose dataset does.
    """
    from rouge_score.rouge_scorer import RougeScorer

    answers = generate(client, model, examples, settings)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = list(zip(examples, answers, strict=True))
    exact = METRICS[plugins.load("dataset", client.data_settings.dataset).METRIC]
    return {
        "rougeL": [100 * float(scorer.score(example.response, answer)["rougeL"].fmeasure) for example, answer in pairs],
        "exact_match": [float(same_answer(answer, example.response)) if exact or example.exact else None for example, answer in pairs],
    }


def choice_scores(client: Client, model: Prediction, examples: Sequence[Example], batch_size: int) -> RowScores:
    """Whether the response is the likeliest of a row's choices, 1 or 0.

    `choice_accuracy` compares the log-likelihoods of the choices after the prompt, the end token left out; `choice_accuracy_norm` divides
    them by the choices' lengths in characters (lm-eval's `acc` and `acc_norm`). Of equal ones the first is taken.
    """
    judged = [number for number, example in enumerate(examples) if example.choices]
    rows = [row for number in judged for row in _choice_rows(client, examples[number])]
    nats = row_sums(client, model, rows, batch_size).nats if rows else np.zeros(0)
    scores: RowScores = {name: [None] * len(examples) for name in ("choice_accuracy", "choice_accuracy_norm")}
    start = 0
    for number in judged:
        example = examples[number]
        own = nats[start : start + len(example.choices)]
        start += len(example.choices)
        right = example.choices.index(example.response)
        scores["choice_accuracy"][number] = float(own.argmin() == right)
        scores["choice_accuracy_norm"][number] = float((own / [len(choice) for choice in example.choices]).argmin() == right)
    return scores


def _choice_rows(client: Client, example: Example) -> list[Row]:
    """One row per choice, all with the prompt that leaves room for the longest."""
    base, data = client.model.base, client.data_settings
    encoded = [encode(replace(example, response=choice), base.tokenizer, data.template, data.max_length) for choice in example.choices]
    longest = max((row for row, _ in encoded), key=lambda row: len(row.ids) - row.start)
    prompt, end = longest.ids[: longest.start], end_id(base.tokenizer, data.template)
    answers = [row.ids[row.start :] for row, _ in encoded]
    return [Row([*prompt, *(ids[:-1] if ids[-1] == end else ids)], len(prompt)) for ids in answers]


def generate(client: Client, model: Prediction, examples: Sequence[Example], settings: EvaluationSettings) -> list[str]:
    """Greedy answers."""
    base, data = client.model.base, client.data_settings
    prompts = [prompt_ids(example, base.tokenizer, data.template, data.max_length) for example in examples]
    options = {"do_sample": False, "max_new_tokens": settings.max_new_tokens, "eos_token_id": end_id(base.tokenizer, data.template)}
    model = replace(model, tree=client.model.placed(model.tree))
    answers = [""] * len(prompts)

    @contextmanager
    def in_use(rows: Sequence[Sequence[int]]) -> Iterator[None]:
        with predicting(client, model, rows), autocast(client.training.precision, base.device):
            yield

    for index, ids in continuations(base, prompts, settings.batch_size, options, in_use):
        answers[index] = str(base.tokenizer.decode(ids, skip_special_tokens=True)).strip()
    return answers


@torch.no_grad()
def continuations(
    base: Base,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    options: Mapping[str, Any],
    in_use: Callable[[Sequence[Sequence[int]]], AbstractContextManager[Any]],
) -> Iterator[tuple[int, list[int]]]:
    """(number of the prompt, new tokens, padding among them), batch by batch with a KV cache, the shortest first; padded on the left.

    `in_use` is asked for the context that a batch of prompts is continued in; `options` are those of transformers' `generate`.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in chosen)
        ids = torch.full((len(chosen), width), base.pad_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(chosen):
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        with in_use([prompts[index] for index in chosen]):
            output: Any = base.model.generate(ids.to(base.device), attention_mask=mask.to(base.device), pad_token_id=base.pad_id, **options)
        for row, index in enumerate(chosen):
            yield index, output[row, width:].tolist()
