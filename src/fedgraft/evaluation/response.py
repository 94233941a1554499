"""Teacher-forced figures over response tokens, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedgraft.address import MIX
from fedgraft.data.batches import Batch, Row, batches_in_order, encode_all
from fedgraft.data.example import Example
from fedgraft.evaluation.gates import Gates
from fedgraft.methods.method import Prediction
from fedgraft.training.client import Client
from fedgraft.training.fit import autocast


@dataclass(frozen=True, kw_only=True)
class RowSums:
    """Sums over the response tokens of every row, each [N], in the order of the rows."""

    nats: NDArray[np.float64]
    """-log p of the tokens."""
    right: NDArray[np.float64]
    """Tokens that are the likeliest."""
    tokens: NDArray[np.float64]

    @property
    def loss(self) -> float:
        """Nats per response token over all rows."""
        return float(self.nats.sum() / max(1.0, self.tokens.sum()))


def predicting(client: Client, model: Prediction, prompts: Sequence[Sequence[int]]) -> AbstractContextManager[None]:
    """The model in use for one batch of rows with these prompts, each blended as the model says."""
    shares = {MIX: model.shares(prompts)} if model.shares is not None else {}
    return client.model.using({**model.tree, **shares}, model.experts)


@torch.no_grad()
def row_sums(client: Client, model: Prediction, rows: Sequence[Row], batch_size: int, gates: Gates | None = None) -> RowSums:
    """What a model makes of every row's response; `gates` sees those of its grafts."""
    base = client.model.base
    found = torch.zeros(3, len(rows), dtype=torch.float64)
    model = replace(model, tree=client.model.placed(model.tree))
    watching = partial(client.model.watching_gates, gates.see) if gates is not None else nullcontext
    for chosen, cpu_batch in batches_in_order(rows, batch_size, base.pad_id):
        batch = cpu_batch.to(base.device)
        if gates is not None:
            gates.expect(batch.mask != 0)
        in_use = predicting(client, model, [rows[index].ids[: rows[index].start] for index in chosen])
        with in_use, watching(), autocast(client.training.precision, base.device), base.logits_at(batch.predicting):
            logits = base.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        found[:, chosen] = _sums(logits.float(), batch).cpu()
    nats, right, tokens = found.numpy()
    return RowSums(nats=nats, right=right, tokens=tokens)


def response_figures(client: Client, model: Prediction, examples: Sequence[Example], batch_size: int) -> dict[str, Any]:
    """`response_sums` without the rows."""
    return response_sums(client, model, examples, batch_size)[0]


def response_sums(client: Client, model: Prediction, examples: Sequence[Example], batch_size: int) -> tuple[dict[str, Any], RowSums]:
    """Teacher-forced figures over the response tokens of `examples`, and the sums of every row.

    Returns:
        loss (nats per response token), perplexity, token_accuracy in [0, 1], rows, truncated rows, response_tokens; for a model with grafts
        also gate_mean [L][r], the mean of sigmoid(g.x) over all tokens of the rows, prompts included.
    """
    gates = Gates()
    rows, truncated = encode_all(list(examples), client.model.base.tokenizer, client.data_settings)
    sums = row_sums(client, model, rows, batch_size, gates if model.experts else None)
    tokens = int(sums.tokens.sum())
    figures = {
        "loss": sums.loss,
        "perplexity": math.exp(min(sums.loss, 700.0)),
        "token_accuracy": float(sums.right.sum()) / max(1, tokens),
        "rows": len(rows),
        "truncated": truncated,
        "response_tokens": tokens,
        **({"gate_mean": means} if (means := gates.means()) else {}),
    }
    return figures, sums


def _sums(logits: Tensor, batch: Batch) -> Tensor:
    """(nats, right tokens, tokens) of every row of the batch, [3, B]; logits [N, V] are those of its `predicting` positions."""
    row = batch.predicting.nonzero()[:, 0]
    nats = F.cross_entropy(logits, batch.targets, reduction="none")
    each = torch.stack((nats.double(), (logits.argmax(-1) == batch.targets).double(), torch.ones_like(nats, dtype=torch.float64)))
    return torch.zeros(3, len(batch.ids), dtype=torch.float64, device=logits.device).index_add(1, row, each)
