"""How well a client's models do on its own held-out rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fedgraft.bundle import Bundle
from fedgraft.data.batches import batches_in_order, encode_all, prompt_ids
from fedgraft.data.example import Example
from fedgraft.data.templates import end_id
from fedgraft.evaluation.knowledge import general_loss, task_figures
from fedgraft.evaluation.settings import EvaluationSettings
from fedgraft.methods.method import Method, Prediction
from fedgraft.training.client import Client
from fedgraft.training.fit import autocast


def evaluate_client(method: Method, client: Client, package: Bundle, settings: EvaluationSettings) -> Bundle:
    """Measure the wanted models of one client; the reply holds figures only."""
    models = {name: model for name, model in method.answer(method, client, package).items() if name in settings.models}
    rows = getattr(client.data, settings.split)[: settings.rows]
    results: dict[str, Any] = {}
    for done, (name, model) in enumerate(models.items()):
        client.report(done, len(models), note=f"model {name}")
        figures = response_figures(client, model, rows, settings.batch_size)
        if settings.generate and name in settings.generate_models:
            figures["rougeL"] = rouge_l(client, model, rows[: settings.generate_rows], settings)
        if settings.knowledge_tokens and name in settings.knowledge_models:
            with client.model.using(model.tree, model.experts):
                figures["general_loss"] = general_loss(client.model.base, settings.knowledge_tokens, client.training.precision)
        if name in settings.task_models:
            with client.model.using(model.tree, model.experts):
                figures |= task_figures(client.model.base, settings, client.training.precision, untouched=not model.tree)
        results[name] = figures
    return Bundle(facts={"models": results})


@torch.no_grad()
def response_figures(client: Client, model: Prediction, examples: Sequence[Example], batch_size: int) -> dict[str, Any]:
    """Teacher-forced figures over the response tokens of `examples`.

    Returns:
        loss (nats per response token), perplexity, token_accuracy in [0, 1], rows, truncated rows, response_tokens; for a model with grafts
        also gate_mean [L][r], the mean of sigmoid(g.x) over all tokens of the rows, prompts included.
    """
    base, gates = client.model.base, _Gates()
    rows, truncated = encode_all(list(examples), base.tokenizer, client.data_settings)
    nll, right, tokens = 0.0, 0, 0
    watching = client.model.watching_gates(gates.see) if model.experts else nullcontext()
    with client.model.using(model.tree, model.experts), watching:
        for _, cpu_batch in batches_in_order(rows, batch_size, base.pad_id):
            batch = cpu_batch.to(base.device)
            gates.expect(batch.mask != 0)
            with autocast(client.training.precision, base.device), base.logits_at(batch.predicting):
                logits = base.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
            sums = _response_sums(logits.float(), batch.targets)
            nll, right, tokens = nll + sums[0], right + int(sums[1]), tokens + int(sums[2])
    loss = nll / max(1, tokens)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "token_accuracy": right / max(1, tokens),
        "rows": len(rows),
        "truncated": truncated,
        "response_tokens": tokens,
        **({"gate_mean": means} if (means := gates.means()) else {}),
    }


class _Gates:
    """Running means of the gates over the tokens that are no padding."""

    def __init__(self) -> None:
        self.sums: dict[tuple[int, int], Tensor | float] = {}
        self.real, self.tokens = torch.zeros(0, dtype=torch.bool), 0

    def expect(self, real: Tensor) -> None:
        """The next forward sees these tokens, [B, T] bool."""
        self.real, self.tokens = real.flatten(), self.tokens + int(real.sum())

    def see(self, layer: int, number: int, gate: Tensor) -> None:
        """Gate values [B x T] of one graft in that forward."""
        self.sums[layer, number] = self.sums.get((layer, number), 0.0) + gate[self.real].double().sum()

    def means(self) -> list[list[float]]:
        """[L][r], layers with a graft in their order; empty without any."""
        means = {place: float(total) / max(1, self.tokens) for place, total in sorted(self.sums.items())}
        return [[mean for (at, _), mean in means.items() if at == layer] for layer in dict.fromkeys(layer for layer, _ in means)]


def _response_sums(logits: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """(summed nats, correct tokens, tokens) for logits [N, V] and targets [N]."""
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return float(nll), float((logits.argmax(-1) == targets).sum()), float(targets.numel())


@torch.no_grad()
def rouge_l(client: Client, model: Prediction, examples: Sequence[Example], settings: EvaluationSettings) -> float:
    """Mean ROUGE-L F1 (rouge-score, stemmer) of greedy answers, in percent."""
    from rouge_score.rouge_scorer import RougeScorer

    answers = generate(client, model, examples, settings)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(example.response, answer)["rougeL"].fmeasure for example, answer in zip(examples, answers, strict=True)]
    return float(100 * sum(scores) / max(1, len(scores)))


@torch.no_grad()
def generate(client: Client, model: Prediction, examples: Sequence[Example], settings: EvaluationSettings) -> list[str]:
    """Greedy answers with a KV cache, batched; prompts are padded on the left."""
    base, data = client.model.base, client.data_settings
    prompts = [prompt_ids(example, base.tokenizer, data.template, data.max_length) for example in examples]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": settings.max_new_tokens}
    options |= {"pad_token_id": base.pad_id, "eos_token_id": end_id(base.tokenizer, data.template)}
    answers = [""] * len(prompts)
    with client.model.using(model.tree, model.experts):
        for start in range(0, len(order), settings.batch_size):
            chosen = order[start : start + settings.batch_size]
            width = max(len(prompts[index]) for index in chosen)
            ids = torch.full((len(chosen), width), base.pad_id)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(chosen):
                ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
                mask[row, width - len(prompts[index]) :] = 1
            with autocast(client.training.precision, base.device):
                output: Any = base.model.generate(ids.to(base.device), attention_mask=mask.to(base.device), **options)
            for row, index in enumerate(chosen):
                answers[index] = str(base.tokenizer.decode(output[row, width:], skip_special_tokens=True)).strip()
    return answers
