"""What a round cannot go below: the time of its matrix products alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import plain_loop
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
PRODUCTS: dict[Any, Callable[..., int]] = {
    ATEN.mm.default: lambda a, b: 2 * a.numel() * b.shape[-1],
    ATEN.bmm.default: lambda a, b: 2 * a.numel() * b.shape[-1],
    ATEN.addmm.default: lambda bias, a, b: 2 * a.numel() * b.shape[-1],
    ATEN._grouped_mm.default: lambda a, b, *_: 2 * a.numel() * b.shape[-1],
    ATEN._scaled_dot_product_flash_attention_for_cpu.default: lambda q, k, *_: 4 * q.numel() * k.shape[-2],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default: lambda up, q, k, *_: 10 * q.numel() * k.shape[-2],
}
"""Operators that are products, attention with its softmax included -> their floating-point operations."""


class Products(TorchDispatchMode):
    """Counts products and the time they take, with the shapes, the data and the caches that they have in their place."""

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.clock, self.operations = plain_loop.Clock(), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run it, under the clock if it is a product."""
        if function not in PRODUCTS:
            return function(*args, **(kwargs or {}))
        self.operations += PRODUCTS[function](*args)
        with self.clock.running():
            return function(*args, **(kwargs or {}))
