"""What a client finds out about its own rows without training: states of prompts, the loss of some leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgraft.data.batches import Row, batches_in_order, encode_all
from fedgraft.data.example import Example
from fedgraft.training.client import Client
from fedgraft.training.fit import autocast


@torch.no_grad()
def last_states(client: Client, tree: Mapping[str, Tensor], prompts: Sequence[Sequence[int]]) -> Tensor:
    """[N, H] fp32 on the CPU: what the model with `tree` in use hands to its head at the last token of each of N prompts."""
    base = client.model.base
    rows = [Row(list(ids), start=len(ids)) for ids in prompts]
    states: dict[int, Tensor] = {}
    with client.model.using(tree, client.experts), autocast(client.training.precision, base.device):
        for chosen, cpu_batch in batches_in_order(rows, client.training.batch_size, base.pad_id):
            batch = cpu_batch.to(base.device)
            last = batch.mask.cumsum(1) == batch.mask.sum(1, keepdim=True)
            states |= dict(zip(chosen, base.states_at(batch.ids, batch.mask, last & (batch.mask != 0)).float().cpu(), strict=True))
    return torch.stack([states[number] for number in range(len(rows))])


def loss_on(client: Client, examples: Sequence[Example]) -> Callable[[Mapping[str, Tensor]], float]:
    """A function from leaves to the mean loss of the responses in `examples`, nats per response token."""
    base = client.model.base
    rows, _ = encode_all(examples, base.tokenizer, client.data_settings)
    batches = [batch for _, batch in batches_in_order(rows, client.training.batch_size, base.pad_id)]
    tokens = sum(batch.response_tokens for batch in batches)

    @torch.no_grad()
    def loss(tree: Mapping[str, Tensor]) -> float:
        total = 0.0
        with client.model.using(tree, client.experts), autocast(client.training.precision, base.device):
            for cpu_batch in batches:
                batch = cpu_batch.to(base.device)
                with base.logits_at(batch.predicting):
                    logits = base.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
                total += float(F.cross_entropy(logits.float(), batch.targets, reduction="sum"))
        return total / max(1, tokens)

    return loss
