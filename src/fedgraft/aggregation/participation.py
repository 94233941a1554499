"""Who takes part in a round: sampling, simulated drop-outs, stragglers and late joiners, all functions of (seed, round, client)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

from fedgraft import plugins, seeds
from fedgraft.aggregation.merges import Merge
from fedgraft.aggregation.settings import FederationSettings

Steps: TypeAlias = Callable[[int, str], int]
"""(round, client) -> optimiser steps it does there."""


@dataclass(frozen=True, kw_only=True)
class Participation:
    """One round's clients, each list in the order of the run's clients."""

    asked: list[str]
    """Sampled and reached; they train."""
    dropped: list[str] = field(default_factory=list)
    """Sampled, but not reached."""
    steps: dict[str, int] = field(default_factory=dict)
    """Optimiser steps of those asked."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Simulated seconds of those asked; empty without a deadline."""
    late: list[str] = field(default_factory=list)
    """Asked, but beyond the deadline: their replies are lost."""

    def facts(self, unequal: bool) -> dict[str, Any]:
        """What the record of the round says of the simulation, steps only where they are `unequal`; empty when nothing is simulated."""
        keys = ("dropped", "seconds", "late", *(["steps"] if unequal else []))
        return {key: value for key in keys if (value := getattr(self, key))}


def take_part(settings: FederationSettings, clients: Sequence[str], seed: int, round_number: int, steps: Steps) -> Participation:
    """The clients of a round."""
    sampled = SAMPLES[settings.sampling](settings, clients, seed, round_number)
    gone = {name for name in sampled if _dropped(settings, seed, round_number, name)}
    dropped, asked = ([name for name in sampled if (name in gone) == away] for away in (True, False))
    done = {name: steps(round_number, name) for name in asked}
    if settings.deadline is None:
        return Participation(asked=asked, dropped=dropped, steps=done)
    seconds = {name: round(done[name] * _step_seconds(settings, seed, round_number, name), 6) for name in asked}
    late = [name for name in asked if seconds[name] > settings.deadline]
    return Participation(asked=asked, dropped=dropped, steps=done, seconds=seconds, late=late)


def expected(settings: FederationSettings, clients: Sequence[str], seed: int, rounds: Sequence[int]) -> int:
    """How many replies these rounds wait for, all told.

    Counted; under `poisson` the mean, since counting would draw for every client in every round before the first one.
    """
    if settings.sampling == "poisson":
        return round(len(rounds) * settings.clients_of(len(clients)) * (1 - settings.dropout))
    return sum(len(take_part(settings, clients, seed, number, lambda *_: 0).asked) for number in rounds)


def _fixed(settings: FederationSettings, clients: Sequence[str], seed: int, round_number: int) -> list[str]:
    there = present(settings, clients, seed, round_number)
    order = seeds.numpy_rng(seed, "sampling", round_number).permutation(len(there))
    return [there[index] for index in sorted(order[: settings.clients_of(len(there))].tolist())]


def _poisson(settings: FederationSettings, clients: Sequence[str], seed: int, round_number: int) -> list[str]:
    """The probability is one of all clients, so that it does not depend on who else is there."""
    rate = settings.clients_of(len(clients)) / len(clients)
    there = present(settings, clients, seed, round_number)
    return [name for name in there if seeds.uniform(seed, "sampling", round_number, name) < rate]


SAMPLES: dict[str, Callable[[FederationSettings, Sequence[str], int, int], list[str]]] = {"fixed": _fixed, "poisson": _poisson}


def present(settings: FederationSettings, clients: Sequence[str], seed: int, round_number: int) -> list[str]:
    """The clients that have joined by a round."""
    if settings.join == 0:
        return list(clients)
    if isinstance(settings.join, dict):
        return [name for name in clients if settings.join.get(name, 0) <= round_number]
    first = _first_rounds(settings.join, tuple(clients), seed)
    return [name for name, joins in zip(clients, first, strict=True) if joins <= round_number]


def check(settings: FederationSettings, clients: Sequence[str], merge: Merge) -> None:
    """The settings fit these clients.

    Raises:
        ValueError: an unknown client joins, or the merge needs more replies than a round can have.
    """
    for name in settings.join if isinstance(settings.join, dict) else ():
        if name not in clients:
            raise ValueError(
                f"federation.join: there is no client {name!r}{plugins.nearest(name, list(clients))}; clients: {', '.join(clients)}"
            )
    sampled = settings.clients_of(len(clients))
    if sampled < merge.least:
        raise ValueError(
            f"federation.merge: {settings.merge.rule} with these settings needs {merge.least} replies, but a round asks {sampled} of"
            f" {len(clients)} clients; ask more, change its settings, or choose another rule"
        )


@lru_cache(maxsize=2)
def _first_rounds(most: int, clients: tuple[str, ...], seed: int) -> list[int]:
    """Of each client, drawn once for all rounds."""
    return [int(seeds.numpy_rng(seed, "join", name).integers(most + 1)) for name in clients]


def _dropped(settings: FederationSettings, seed: int, round_number: int, client: str) -> bool:
    return settings.dropout > 0 and bool(seeds.numpy_rng(seed, "dropout", round_number, client).random() < settings.dropout)


def _step_seconds(settings: FederationSettings, seed: int, round_number: int, client: str) -> float:
    low, high = map(math.log, settings.step_seconds)
    usual = low + (high - low) * seeds.numpy_rng(seed, "speed", client).random()
    return math.exp(usual + settings.jitter * seeds.numpy_rng(seed, "jitter", round_number, client).standard_normal())
