"""Training in 16 bits on a CPU, spared what torch is slow at there (`benchmarks/cohort.py` measures it)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

GROUP = 16
"""Rows of an expert are filled up to a multiple of this: oneDNN builds a kernel for each new shape, for about as long as it then runs."""
SHORT = (torch.bfloat16, torch.float16)


@contextmanager
def faster_on_cpu() -> Iterator[None]:
    """transformers' SDPA computes 16-bit inputs on a CPU in fp32, `grouped_mm` runs 16-bit experts there on rows filled up.

    SDPA's backward takes twice as long in bf16. What is fp32, or on a GPU, is computed as ever.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    replaced: list[tuple[Any, str, Any]] = [(ALL_ATTENTION_FUNCTIONS, "sdpa", attention), (ALL_EXPERTS_FUNCTIONS, "grouped_mm", experts)]
    before = [functions[name] for functions, name, _ in replaced]
    for functions, name, own in replaced:
        functions[name] = own
    try:
        yield
    finally:
        for (functions, name, _), function in zip(replaced, before, strict=True):
            functions[name] = function


def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> tuple[Tensor, None]:
    """transformers' SDPA; 16-bit inputs on a CPU in fp32, and the output in their type."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dtype = query.dtype
    if query.device.type != "cpu" or dtype not in SHORT:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return output.to(dtype), None


def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' `grouped_mm` experts [T, H] for x [T, H], index and weight [T, k]; 16-bit ones on a CPU on rows filled up."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    run = grouped_mm_experts_forward
    if hidden_states.device.type == "cpu" and module.down_proj.dtype in SHORT:
        tokens, k = top_k_index.shape
        rows, index, weight = filled_up(hidden_states, top_k_index, top_k_weights, module.num_experts)
        return run(module, rows, index, weight)[: tokens * k].view(tokens, k, -1).sum(1)
    return run(module, hidden_states, top_k_index, top_k_weights)


def filled_up(x: Tensor, index: Tensor, weight: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """A row for every token and expert of its own, then rows of zeros with weight 0 that make each expert's number a multiple of `GROUP`.

    Returns:
        rows [R, H], index [R, 1], weight [R, 1].
    """
    chosen = index.flatten()
    spare = -torch.bincount(chosen, minlength=num_experts)[:num_experts] % GROUP
    filling = torch.repeat_interleave(torch.arange(num_experts, dtype=chosen.dtype), spare)
    return (
        torch.cat([x.repeat_interleave(index.shape[1], 0), x.new_zeros(len(filling), x.shape[-1])]),
        torch.cat([chosen, filling])[:, None],
        torch.cat([weight.flatten(), weight.new_zeros(len(filling))])[:, None],
    )
