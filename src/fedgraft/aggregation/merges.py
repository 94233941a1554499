"""Merges: many replies -> one delta. Every leaf is averaged over the clients that hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from fedgraft.tree import Tree, check_holds

PIECE = 1 << 17
"""Numbers that are folded at a time: few enough for the processor's cache, enough that the calls for a piece take little of its time."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """One client's change of the shared leaves."""

    client: str
    delta: Mapping[str, Tensor]
    """Trained - received, float64."""
    examples: int
    """Training rows of the client."""


class Difference(Mapping[str, Tensor]):
    """`subtract(new, old)`, of which a leaf is made when it is looked at, so that no more than one need be there."""

    def __init__(self, new: Tree, old: Tree) -> None:
        """Take both as they are.

        Raises:
            ValueError: as `subtract`.
        """
        check_holds(new, old)
        self.new, self.old = new, old

    def __getitem__(self, key: str) -> Tensor:
        """One leaf, float64."""
        return self.new[key].double() - self.old[key].double()

    def __iter__(self) -> Iterator[str]:
        """Addresses."""
        return iter(self.new)

    def __len__(self) -> int:
        """Leaves."""
        return len(self.new)


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
            share, delta = weight(update), update.delta
            new, old = (delta.new, delta.old) if isinstance(delta, Difference) else (delta, None)
            for key, leaf in new.items():
                if key not in mean:
                    mean[key], total[key], first[key] = (
                        delta[key].to(torch.float64, memory_format=torch.contiguous_format, copy=True),
                        share,
                        update.client,
                    )
                    continue
                check_shapes(key, first[key], mean[key], update.client, leaf)
                total[key] += share
                _approach(mean[key], leaf, None if old is None else old[key], share / total[key])
        return mean

    return run


def _approach(mean: Tensor, new: Tensor, old: Tensor | None, share: float) -> None:
    """mean += (new - old - mean) * share, a large leaf piece by piece, so that what lies between stays in the processor's cache."""
    if mean.numel() <= PIECE:
        mean.lerp_(new.double() if old is None else new.double() - old, share)
        return
    befores = repeat(None) if old is None else old.reshape(-1).split(PIECE)
    for here, there, before in zip(mean.view(-1).split(PIECE), new.reshape(-1).split(PIECE), befores, strict=False):
        _approach(here, there, before, share)


by_examples = Merge(run=weighted_mean(lambda update: float(update.examples)), weight=lambda examples: examples)
"""sum_c n_c delta_c / sum_c n_c over the holders of each leaf (McMahan et al. 2017)."""

uniform = Merge(run=weighted_mean(lambda update: 1.0), weight=lambda examples: 1)
"""Unweighted mean over the holders of each leaf."""

MEANS = (by_examples, uniform)
"""The merges that `federation.merge` may take the place of."""
