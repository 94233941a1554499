"""The coordinator as methods see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fedgraft.aggregation.participation import Participation, Steps, expected, present, take_part
from fedgraft.aggregation.settings import FederationSettings
from fedgraft.bundle import Bundle
from fedgraft.tree import Tree


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
    steps: Steps = lambda round_number, client: 1
    """(round, client) -> optimiser steps it does there, for simulated time."""
    state: Bundle = field(default_factory=Bundle)
    round: int = 0
    """Number of the round in hand = rounds finished."""
    _part: tuple[int, Participation] | None = field(default=None, repr=False)
    """The round that was last asked for, since drawing for very many clients takes its time."""

    def sampled(self) -> list[str]:
        """Clients that are asked in this round, in the order of `clients`."""
        return self.participation(self.round).asked

    def participation(self, round_number: int) -> Participation:
        """Who takes part in a round."""
        if self._part is None or self._part[0] != round_number:
            self._part = (round_number, take_part(self.federation, self.clients, self.seed, round_number, self.steps))
        return self._part[1]

    def expected(self) -> int:
        """How many replies the rounds that are left wait for."""
        return expected(self.federation, self.clients, self.seed, range(self.round, self.federation.rounds))

    def present(self) -> list[str]:
        """Clients that have joined by now."""
        return present(self.federation, self.clients, self.seed, self.round)

    def round_lr(self) -> float:
        """Cosine over rounds from `lr` to `lr_min`, constant inside a round; the last round trains at `lr_min`."""
        last = max(1, self.federation.rounds - 1)
        return self.lr_min + (self.lr - self.lr_min) * (1 + math.cos(math.pi * min(self.round, last) / last)) / 2

    def package(self, trees: dict[str, Tree] | None = None, **facts: Any) -> Bundle:
        """A package for a client, stamped with the round and its learning rate."""
        return Bundle(trees=trees or {}, facts={"round": self.round, "lr": self.round_lr(), **facts})
