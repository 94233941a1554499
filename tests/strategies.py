"""Hypothesis strategies for trees, and `given` without a clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

ADDRESSES = [
    "layers.0.attention.q.A",
    "layers.0.attention.q.B",
    "layers.3.side.0.expert.gate.A",
    "layers.3.side.0.mix.weight",
    "layers.12.side.1.mix.bias",
    "layers.12.router.weight",
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)) -> Tensor:
    """Any bits (NaN and infinities too) of any dtype, 0 to 3 dimensions, perhaps without elements."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=rng).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=rng)
    return raw.view(dtype).reshape(shape)


def trees(dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)) -> st.SearchStrategy[dict[str, Tensor]]:
    """Trees of up to six leaves, the empty one included."""
    return st.dictionaries(st.sampled_from(ADDRESSES), tensors(dtypes))


def given(*arguments: Any, max_examples: int = 100, **named: Any) -> Callable[[Any], Any]:
    """`hypothesis.given` without limits of time, since a busy machine can stall any test for seconds."""
    unhurried = settings(max_examples=max_examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    return lambda test: unhurried(hypothesis.given(*arguments, **named)(test))
