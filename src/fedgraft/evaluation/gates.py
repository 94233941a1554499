"""How far the gates of a model's grafts open."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")
BINS = 10
"""Equal bins of a gate's histogram over [0, 1]."""


class Gates:
    """Running means and histograms of the gates over the tokens that are no padding."""

    def __init__(self) -> None:
        self.sums: dict[tuple[int, int], Tensor | float] = {}
        self.counts: dict[tuple[int, int], Tensor] = {}
        self.real, self.tokens = torch.zeros(0, dtype=torch.bool), 0

    def expect(self, real: Tensor) -> None:
        """The next forward sees these tokens, [B, T] bool."""
        self.real, self.tokens = real.flatten(), self.tokens + int(real.sum())

    def see(self, layer: int, number: int, gate: Tensor) -> None:
        """Gate values [B x T] of one graft in that forward."""
        place, seen = (layer, number), gate[self.real].double()
        self.sums[place] = self.sums.get(place, 0.0) + seen.sum()
        bins = (seen * BINS).long().clamp(0, BINS - 1)  # a router's own weight, of a graft in place, may be above 1
        counts = torch.bincount(bins.cpu(), minlength=BINS)
        self.counts[place] = self.counts[place] + counts if place in self.counts else counts

    def means(self) -> list[list[float]]:
        """[L][r], layers with a graft in their order; empty without any."""
        return self._by_layer({place: float(total) / max(1, self.tokens) for place, total in self.sums.items()})

    def histograms(self) -> list[list[list[float]]]:
        """[L][r][`BINS`]: the share of the tokens whose gate is in each bin."""
        return self._by_layer({place: (counts / max(1, self.tokens)).tolist() for place, counts in self.counts.items()})

    def layers(self) -> list[int]:
        """The decoder layers that have a graft, in their order."""
        return sorted({layer for layer, _ in self.sums})

    def _by_layer(self, values: dict[tuple[int, int], Value]) -> list[list[Value]]:
        return [[value for (at, _), value in sorted(values.items()) if at == layer] for layer in self.layers()]
