"""Differential privacy of rows (DP-SGD; Abadi et al. 2016): in every optimiser step the gradient of each row is clipped, their sum noised.

Every row is in a step with the same probability, by itself, and the sum is divided by the number of rows that are expected. All leaves
that train together are clipped together and noised together, personal ones too: were these left out, a row would steer them without a
bound, and through them the gradients of all other rows for the shared ones. So a client's personal model has the same guarantee as what
it sends. All that comes after the noise (AdamW, penalties, control variates, merges of any kind) is post-processing.

A step costs a forward and a backward pass for each row in the place of one for all; the memory is that of a single row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedgraft.bundle import Bundle
from fedgraft.training.client import Client
from fedgraft.transforms.client_privacy import norm_of, share_within
from fedgraft.transforms.noise import Noise
from fedgraft.transforms.privacy import ExamplePrivacy, Question
from fedgraft.tree import Tree


@dataclass(kw_only=True)
class Gradients:
    """The clipped gradients of the rows of a step, one after another, and their noised mean."""

    settings: ExamplePrivacy
    noise: Noise
    expected: float
    """Rows of a step, on average: the divisor, however many there are."""
    total: Tree = field(default_factory=dict)
    steps: int = 0

    def take(self, leaves: Mapping[str, Tensor]) -> None:
        """Add the gradients, which are those of one row, and take them away."""
        found = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
        norm = norm_of(found)
        share = share_within(norm, self.settings.clip) if math.isfinite(norm) else math.nan  # which ends the round
        for key, gradient in found.items():
            part = gradient.double() * share
            self.total[key] = self.total[key] + part if key in self.total else part
            leaves[key].grad = None

    def give(self, leaves: Mapping[str, Tensor]) -> None:
        """Put the noised mean where the optimiser looks for gradients, on leaves that no row has reached too."""
        settings, own = self.settings, self.noise.about(self.total)
        deviation = settings.noise_multiplier * (settings.clip or 0.0)
        for key, leaf in leaves.items():
            total = self.total.get(key)
            if deviation > 0:
                drawn = own.normal(tuple(leaf.shape), self.steps, key).to(leaf.device) * deviation
                total = drawn if total is None else total + drawn
            leaf.grad = None if total is None else (total / self.expected).to(leaf.dtype)
        self.total, self.steps = {}, self.steps + 1


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How a client trains by rows in one round."""

    settings: ExamplePrivacy
    noise: Noise

    def chosen(self, step: int, count: int, expected: int) -> list[int]:
        """Which of `count` rows are in a step: each by itself, `expected` on average."""
        rate = expected / count
        return [index for index, at in enumerate(self.noise.uniform(count, "chosen", step)) if at < rate]

    def gradients(self, expected: int) -> Gradients:
        """What the gradients of rows go through."""
        return Gradients(settings=self.settings, noise=self.noise.below("gradients"), expected=expected)


def by_rows(settings: ExamplePrivacy, noise_of: Callable[[str], Noise], question: Question) -> Question:
    """The question `train` to a client that trains by rows, with noise from a secret of its own."""

    def asked(client: Client, package: Bundle) -> Bundle:
        own = noise_of(client.name).about(*package.trees.values(), *client.memory.trees.values())
        client.by_rows = Rows(settings=settings, noise=own.below("rows", str(package.facts["round"])))
        return question(client, package)

    return asked
