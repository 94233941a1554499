"""What the coordinator of a run begins with: its server, and what is promised to sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from fedgraft.aggregation.server import Server
from fedgraft.engine.card import Card
from fedgraft.recipe import Recipe
from fedgraft.training.settings import TrainingSettings
from fedgraft.transforms.guarantee import Guarantee
from fedgraft.tree import Tree


class Sites(Protocol):
    """Who takes part."""

    @property
    def clients(self) -> Sequence[str]:
        """Names of those that federate."""

    @property
    def sites(self) -> Sequence[str]:
        """Who trains."""

    def cards(self) -> list[Card]:
        """How each client has introduced itself."""


def server_of(
    recipe: Recipe, training: TrainingSettings, sites: list[str], fresh_shared: Callable[[], Tree], seed: int | None = None
) -> Server:
    """The coordinator's side of a run, still without a state.

    Args:
        recipe: the run.
        training: how its sites train.
        sites: names of who trains.
        fresh_shared: makes new leaves of everything in `lora.targets`.
        seed: who takes part follows from it; None: the recipe's.
    """
    return Server(
        clients=sites,
        seed=recipe.seed if seed is None else seed,
        federation=recipe.federation,
        lr=recipe.training.lr,
        lr_min=recipe.training.lr_min,
        fresh_shared=fresh_shared,
        steps=lambda number, client: training.steps_of(recipe.seed, number, client),
    )


def promise(recipe: Recipe, folder: Path, reach: Sites, steps: int) -> Guarantee:
    """What a run promises its clients or their rows.

    Args:
        recipe: the run.
        folder: of the run.
        reach: its clients.
        steps: optimiser steps of a site in a round, at most.

    Raises:
        ValueError: it could not be kept.
    """

    def rows() -> dict[str, int]:
        known = {card.name: card.rows.get("train", 0) for card in reach.cards()}
        pooled = {name: sum(known[client] for client in reach.clients) for name in reach.sites if name not in known}
        return {name: known.get(name, 0) or pooled[name] for name in reach.sites}

    return Guarantee(recipe=recipe, folder=folder, seed=recipe.seed, sites=list(reach.sites), rows=rows, steps=steps)
