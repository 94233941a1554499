"""How a run reaches its clients: in its own process, or from afar, where it has neither rows nor weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias

from fedgraft.engine.card import Card
from fedgraft.engine.engine import Engine, Listener
from fedgraft.engine.inprocess import InProcess
from fedgraft.hosting import Holdings
from fedgraft.moe.family import Anatomy
from fedgraft.recipe import EngineSettings, Recipe
from fedgraft.tree import Tree


class Reach(Protocol):
    """The clients of a run and what is known of their base model."""

    clients: list[str]
    """Names, sorted."""
    sites: list[str]
    """Who trains: the clients, or the one site of a method that pools their rows."""

    def anatomy(self) -> Anatomy:
        """The base's anatomy, with weights or without; loads it when first asked.

        Raises:
            ValueError: there is no such base, or it cannot be grafted on.
        """

    def engine(self) -> Engine:
        """The one engine of the run, when the anatomy is known to fit."""

    def cards(self) -> list[Card]:
        """How each client has introduced itself."""

    def fresh_adapters(self) -> Tree:
        """New leaves of everything in `lora.targets`."""

    def close(self) -> None:
        """The run is over or stopped; safe to call again."""


Connect: TypeAlias = Callable[[Recipe, Path, str, Listener], Reach]
"""(recipe, run folder, the run's id, who hears of it) -> reach."""


class Here:
    """Everything in this process."""

    def __init__(self, recipe: Recipe, folder: Path, run: str, listener: Listener) -> None:
        self.holdings = Holdings(recipe, folder / "clients", listener.hear)
        self.clients, self.sites = list(self.holdings.clients), list(self.holdings.sites)
        self._listener = listener

    def anatomy(self) -> Anatomy:
        """The loaded base."""
        return self.holdings.base

    def engine(self) -> InProcess:
        """A loop over this process's site."""
        site = self.holdings.site(self.sites)
        _ = self.holdings.model  # so that what cannot work fails now
        return InProcess(site=site, on_failure=self._listener.failed)

    def cards(self) -> list[Card]:
        """How each client would introduce itself."""
        return [self.holdings.card(name) for name in self.clients]

    def fresh_adapters(self) -> Tree:
        """New leaves of everything in `lora.targets`."""
        return self.holdings.model.fresh_adapters(self.holdings.recipe.seed)

    def close(self) -> None:
        """Nothing is held but memory."""


def connecting(settings: EngineSettings) -> Connect:
    """How the clients of a recipe's engine are reached."""
    return CONNECT[settings.name]


CONNECT: dict[str, Connect] = {"inprocess": Here}
