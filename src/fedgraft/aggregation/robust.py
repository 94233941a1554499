"""Merges that bound what a few faulty or hostile clients can do, as the recipe's `federation.merge`.

All of them count every client once: numbers of examples are the clients' own word. They see each reply, so none fits secure aggregation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from fedgraft.aggregation.merges import Merge, Update, check_shapes, uniform
from fedgraft.settings import Section
from fedgraft.tree import Tree


class Mean(Section):
    """The method's own weighted mean."""

    rule: Literal["mean"] = "mean"
    """`mean`, or a rule that withstands faulty clients: `median`, `trimmed_mean`, `krum`, `multi_krum`, `norm_bounded`."""

    def merge(self, own: Merge) -> Merge:
        """What the method came with."""
        return own


class Median(Section):
    """Coordinate-wise median (Yin et al. 2018)."""

    rule: Literal["median"] = "median"

    def merge(self, own: Merge) -> Merge:
        """The middle value of each number, or the mean of the two middle ones."""
        return _coordinates(lambda ordered: (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2, least=1)


class TrimmedMean(Section):
    """Coordinate-wise trimmed mean (Yin et al. 2018)."""

    rule: Literal["trimmed_mean"] = "trimmed_mean"
    trim: float = Field(default=0.25, gt=0, lt=0.5)
    """Share of the clients that is cut from each end, for every number anew, rounded down to whole clients."""

    def merge(self, own: Merge) -> Merge:
        """The mean of what is left of each number; needs so many replies that at least one is cut from each end."""
        least = next(count for count in range(1, int(2 / self.trim) + 2) if int(self.trim * count) > 0)
        return _coordinates(lambda ordered: _cut(ordered, int(self.trim * len(ordered))).mean(0), least=least)


class Krum(Section):
    """Krum (Blanchard et al. 2017): the one update that lies closest to its neighbours."""

    rule: Literal["krum"] = "krum"
    faulty: int = Field(default=1, ge=0)
    """Faulty clients to withstand, f; 2 f + 3 replies are needed."""

    def merge(self, own: Merge) -> Merge:
        """The update with the smallest sum of squared distances to its n - f - 2 nearest ones; ties go to the first in sampled order."""

        def run(updates: list[Update]) -> Tree:
            return dict(updates[_by_score(updates, self.faulty)[0]].delta)

        return _all_at_once(run, least=2 * self.faulty + 3)


class MultiKrum(Section):
    """Multi-Krum (Blanchard et al. 2017): the mean of the updates with the best Krum scores."""

    rule: Literal["multi_krum"] = "multi_krum"
    faulty: int = Field(default=1, ge=0)
    """Faulty clients to withstand, f; 2 f + 3 replies are needed."""
    keep: int | None = Field(default=None, ge=1)
    """Updates to average; empty: replies - f - 2, the most that keeps Krum's guarantee (El Mhamdi et al. 2018)."""

    def merge(self, own: Merge) -> Merge:
        """Unweighted mean of the kept updates."""

        def run(updates: list[Update]) -> Tree:
            kept = _by_score(updates, self.faulty)[: self.keep or len(updates) - self.faulty - 2]
            return uniform.run(updates[index] for index in sorted(kept))

        return _all_at_once(run, least=max(2 * self.faulty + 3, (self.keep or 1) + self.faulty + 2))


class NormBounded(Section):
    """Norm bounding (Sun et al. 2019): no update counts for more than `bound`."""

    rule: Literal["norm_bounded"] = "norm_bounded"
    bound: float = Field(default=1.0, gt=0)
    """Largest Euclidean norm of a client's update over all its leaves; a longer one is scaled down to it."""

    def merge(self, own: Merge) -> Merge:
        """Unweighted mean of the bounded updates, folded as they come."""

        def bounded(updates: Iterable[Update]) -> Iterator[Update]:
            for update in updates:
                norm = sum(float(leaf.square().sum()) for leaf in update.delta.values()) ** 0.5
                scale = min(1.0, self.bound / norm) if norm else 1.0
                delta = {key: leaf * scale for key, leaf in update.delta.items()}
                yield Update(client=update.client, delta=delta, examples=update.examples)

        return Merge(run=lambda updates: uniform.run(bounded(updates)))


MergeSettings: TypeAlias = Annotated[Mean | Median | TrimmedMean | Krum | MultiKrum | NormBounded, Field(discriminator="rule")]


def _coordinates(rule: Callable[[Tensor], Tensor], least: int) -> Merge:
    """A rule on the values [n, ...] of each leaf in ascending order, over its holders."""

    def run(updates: Iterable[Update]) -> Tree:
        held: dict[str, list[tuple[str, Tensor]]] = {}
        for update in updates:
            for key, leaf in update.delta.items():
                holders = held.setdefault(key, [])
                check_shapes(key, *(holders or [(update.client, leaf)])[0], update.client, leaf)
                holders.append((update.client, leaf))
        stacks = {key: torch.stack([leaf for _, leaf in holders]) for key, holders in held.items() if len(holders) >= least}
        return {key: rule(values.sort(0).values) for key, values in stacks.items()}

    return Merge(run=run, needs_each_reply=True, least=least)


def _cut(ordered: Tensor, count: int) -> Tensor:
    return ordered[count : len(ordered) - count]


def _all_at_once(rule: Callable[[list[Update]], Tree], least: int) -> Merge:
    """A rule on whole updates, which must hold the same leaves."""

    def run(updates: Iterable[Update]) -> Tree:
        every = list(updates)
        if len(every) < least:
            return {}
        for update in every[1:]:
            if missing := every[0].delta.keys() ^ update.delta.keys():
                both = f"clients {every[0].client!r} and {update.client!r}"
                raise ValueError(
                    f"leaf {min(missing)!r}: only one of {both} holds it; Krum compares updates of the same leaves, choose median"
                )
            for key, leaf in update.delta.items():
                check_shapes(key, every[0].client, every[0].delta[key], update.client, leaf)
        return rule(every)

    return Merge(run=run, needs_each_reply=True, least=least)


def _by_score(updates: list[Update], faulty: int) -> list[int]:
    """Indices of the updates, the best Krum score first: the sum of squared distances to the n - f - 2 nearest others."""
    count = len(updates)
    distances = torch.zeros(count, count, dtype=torch.float64)
    for key in updates[0].delta:
        rows = torch.stack([update.delta[key].flatten() for update in updates])
        for index in range(count):
            distances[index] += (rows - rows[index]).square().sum(1)
    distances.fill_diagonal_(torch.inf)  # a client is not its own neighbour
    scores = distances.sort(1).values[:, : count - faulty - 2].sum(1)
    return [int(index) for index in scores.argsort(stable=True)]
