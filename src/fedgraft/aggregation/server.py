"""The coordinator as methods see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pydantic import Field

from fedgraft import seeds
from fedgraft.bundle import Bundle
from fedgraft.settings import Section
from fedgraft.tree import Tree


class FederationSettings(Section):
    """Rounds and participation; the defaults are the paper's."""

    rounds: int = Field(default=100, ge=0)
    """Communication rounds."""
    clients_per_round: int | None = Field(default=None, ge=1)
    """Clients sampled in each round, without replacement; empty: all."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One client's answer to one question."""

    client: str
    bundle: Bundle


Ask: TypeAlias = Callable[[str, dict[str, Bundle]], Iterator[Reply]]
"""ask(question, {client: package}) -> replies in the order of the packages; a lost client is absent."""


@dataclass(kw_only=True)
class Server:
    """All that lasts is `state`; everything else is a function of recipe and round."""

    clients: list[str]
    seed: int
    federation: FederationSettings
    lr: float
    lr_min: float
    fresh_shared: Callable[[], Tree]
    """New attention leaves, from which a method's first state is made."""
    state: Bundle = field(default_factory=Bundle)
    round: int = 0
    """Number of the round in hand = rounds finished."""

    def sampled(self) -> list[str]:
        """Clients of this round, in the order of `clients`."""
        wanted = min(self.federation.clients_per_round or len(self.clients), len(self.clients))
        chosen = seeds.numpy_rng(self.seed, "sampling", self.round).permutation(len(self.clients))[:wanted]
        return [self.clients[index] for index in sorted(chosen.tolist())]

    def round_lr(self) -> float:
        """Cosine over rounds from `lr` to `lr_min`, constant inside a round; the last round trains at `lr_min`."""
        last = max(1, self.federation.rounds - 1)
        return self.lr_min + (self.lr - self.lr_min) * (1 + math.cos(math.pi * min(self.round, last) / last)) / 2

    def package(self, trees: dict[str, Tree] | None = None, **facts: Any) -> Bundle:
        """A package for a client, stamped with the round and its learning rate."""
        return Bundle(trees=trees or {}, facts={"round": self.round, "lr": self.round_lr(), **facts})
