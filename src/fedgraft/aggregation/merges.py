"""Merges: many replies -> one delta. Every leaf is averaged over the clients that hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from fedgraft.tree import Tree


@dataclass(frozen=True, kw_only=True)
class Update:
    """One client's change of the shared leaves."""

    client: str
    delta: Tree
    """Trained - received, float64."""
    examples: int
    """Training rows of the client."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A merge rule and what it needs."""

    run: Callable[[Iterable[Update]], Tree]
    weight: Callable[[int], int] | None = None
    """What a client of so many training rows counts; None: the merge is no mean with weights that a client knows by itself."""
    needs_each_reply: bool = False
    """Must see every delta at once; else replies are folded one at a time."""
    least: int = 1
    """Replies below which it cannot judge; with fewer of them a leaf keeps its value."""

    @property
    def linear(self) -> bool:
        """A weighted sum of the deltas, so fit for secure aggregation."""
        return self.weight is not None


def check_shapes(key: str, first: str, leaf: Tensor, second: str, other: Tensor) -> None:
    """Two clients' leaves of one address fit together.

    Raises:
        ValueError: they don't; names the leaf and both clients.
    """
    if leaf.shape != other.shape:
        raise ValueError(f"leaf {key!r}: client {first!r} sent shape {tuple(leaf.shape)}, client {second!r} {tuple(other.shape)}")


def weighted_mean(weight: Callable[[Update], float]) -> Callable[[Iterable[Update]], Tree]:
    """Running weighted mean per leaf in float64: exact for a single client, memory of one tree."""

    def run(updates: Iterable[Update]) -> Tree:
        mean: Tree = {}
        total: dict[str, float] = {}
        first: dict[str, str] = {}
        for update in updates:
            share = weight(update)
            for key, delta in update.delta.items():
                if key not in mean:
                    mean[key], total[key], first[key] = delta.clone(), share, update.client
                    continue
                check_shapes(key, first[key], mean[key], update.client, delta)
                total[key] += share
                mean[key] += (delta - mean[key]) * (share / total[key])
        return mean

    return run


by_examples = Merge(run=weighted_mean(lambda update: float(update.examples)), weight=lambda examples: examples)
"""sum_c n_c delta_c / sum_c n_c over the holders of each leaf (McMahan et al. 2017)."""

uniform = Merge(run=weighted_mean(lambda update: 1.0), weight=lambda examples: 1)
"""Unweighted mean over the holders of each leaf."""

MEANS = (by_examples, uniform)
"""The merges that `federation.merge` may take the place of."""
