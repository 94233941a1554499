"""How a run reaches its clients: in its own process, or from afar, where it has neither rows nor weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from fedgraft import __version__, origin
from fedgraft.account.memory import workload
from fedgraft.account.take import take_account
from fedgraft.aggregation.replies import Due, usable
from fedgraft.bundle import Bundle
from fedgraft.data.partition import load_clients
from fedgraft.engine.card import Card, check_bases
from fedgraft.engine.engine import Engine, Listener
from fedgraft.engine.flower import GridEngine, prepare
from fedgraft.engine.inprocess import InProcess
from fedgraft.engine.settings import EngineSettings, FlowerSettings, InProcessSettings, SimulationSettings
from fedgraft.evaluation.unseen import held_out
from fedgraft.grafts.graft import drawn_adapters
from fedgraft.grafts.router import router_shapes
from fedgraft.handover.start import start_of
from fedgraft.hosting import Holdings, HostHere
from fedgraft.methods.method import settled
from fedgraft.moe.family import Anatomy
from fedgraft.moe.skeleton import skeleton
from fedgraft.recipe import Recipe
from fedgraft.training.client import MemoryStore
from fedgraft.training.cohort import obstacle
from fedgraft.tree import Tree


class Reach(Protocol):
    """The clients of a run and what is known of their base model."""

    clients: list[str]
    """Names of those that federate, sorted."""
    sites: list[str]
    """Who trains: the clients, or the one site of a method that pools their rows."""
    unseen: list[str]
    """Further clients, which are asked once after the last round (`evaluation.unseen`) and never train for the federation."""

    def anatomy(self) -> Anatomy:
        """The base's anatomy, with weights or without; loads it when first asked.

        Raises:
            ValueError: there is no such base, or it cannot be grafted on.
        """

    def engine(self) -> Engine:
        """The one engine of the run, when the anatomy is known to fit."""

    def cards(self) -> list[Card]:
        """How each client has introduced itself, unseen ones too."""

    def start(self) -> Tree:
        """The leaves that `lora.init` names; empty without.

        Raises:
            ValueError: they cannot be the start of this run.
        """

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
        self.holdings.hold_out()
        self.clients, self.sites, self.unseen = list(self.holdings.federated), list(self.holdings.sites), self.holdings.unseen
        self._listener = listener

    def anatomy(self) -> Anatomy:
        """The loaded base."""
        return self.holdings.base

    def engine(self) -> InProcess:
        """A loop over this process's site."""
        if self.holdings.recipe.secure_aggregation.name != "none":  # elsewhere Flower is what reaches the clients
            prepare("flwr", setting="secure_aggregation.name", without="none")
        site = self.holdings.site(sorted([*self.sites, *self.unseen]), lends=True)
        return InProcess(site=site, cohort=self._cohort(), on_failure=self._listener.failed)

    def _cohort(self) -> int:
        """How many clients train at once: a function of recipe and base alone, so that a resumed run repeats its bits."""
        holdings = self.holdings
        recipe, model, _ = holdings.recipe, holdings.model, holdings.start  # so that what cannot work fails now
        if not isinstance(recipe.engine, InProcessSettings) or recipe.engine.cohort == 1:
            return 1
        if reason := obstacle(model, recipe.training):
            self._listener.warn(f"engine.cohort: clients train one after another, since {reason}")
            return 1
        if isinstance(recipe.engine.cohort, int):
            return recipe.engine.cohort
        method = settled(holdings.method, holdings.base, recipe.lora, sorted([*self.sites, *self.unseen]))
        work = workload(recipe.training, length=recipe.data.max_length, dtype=recipe.model.dtype)
        memory = take_account(holdings.base, method, recipe.lora, recipe.graft, work).memory
        return memory.clients_within(round(recipe.engine.cohort_gib * 2**30))

    def cards(self) -> list[Card]:
        """How each client would introduce itself, unseen ones too."""
        return [self.holdings.card(name) for name in self.holdings.clients]

    def start(self) -> Tree:
        """The leaves that `lora.init` names; empty without."""
        return self.holdings.start

    def fresh_adapters(self) -> Tree:
        """New leaves of everything in `lora.targets`."""
        return self.holdings.model.fresh_adapters(self.holdings.recipe.seed)

    def close(self) -> None:
        """Nothing is held but memory."""


class Afar:
    """Clients behind an engine that has been introduced to them; this process has neither rows nor weights."""

    def __init__(self, recipe: Recipe, engine: GridEngine, done: Callable[[], None] = lambda: None) -> None:
        """Take the clients as they are.

        Args:
            recipe: the run.
            engine: knows the clients' cards.
            done: called once nothing more is asked.

        Raises:
            ValueError: the clients hold different base models, or `evaluation.unseen` does not fit them.
        """
        self.recipe, self._engine, self._done = recipe, engine, done
        check_bases(engine.cards)
        rows = {card.name: card.rows.get("train", 0) for card in engine.cards}
        self.unseen = held_out(recipe.evaluation.unseen, rows, recipe.build_method(), recipe.seed)
        self.clients = self.sites = [name for name in rows if name not in self.unseen]
        for card in engine.cards:
            if card.fedgraft != __version__:
                engine.listener.warn(f"client {card.name!r} has fedgraft {card.fedgraft}, the coordinator {__version__}")

    def anatomy(self) -> Anatomy:
        """The base without weights."""
        return self._anatomy

    @cached_property
    def _anatomy(self) -> Anatomy:
        return skeleton(self.recipe.model)

    def engine(self) -> GridEngine:
        """The engine it was made with."""
        _ = self._start
        return self._engine

    def cards(self) -> list[Card]:
        """How each client has introduced itself."""
        return self._engine.cards

    def start(self) -> Tree:
        """The leaves that `lora.init` names; empty without.

        Raises:
            ValueError: as `start_of`, or the method keeps some of these leaves at the sites, which have no such folder.
        """
        return self._start

    @cached_property
    def _start(self) -> Tree:
        recipe = self.recipe
        found = start_of(recipe.lora, self._anatomy, self.cards()[0].base_digest, recipe.seed)
        method = settled(recipe.build_method(), self._anatomy, recipe.lora, sorted([*self.sites, *self.unseen]))
        shapes = method.leaves({key: tuple(leaf.shape) for key, leaf in found.items()})
        if kept := sorted(filter(method.personal, shapes)):
            raise ValueError(
                f"lora.init: method {recipe.method.name!r} keeps {kept[0]} at the sites, which never see that folder; "
                "use another method, or run with engine.name: inprocess"
            )
        return found

    def fresh_adapters(self) -> Tree:
        """New leaves of everything in `lora.targets`; the routers' rows, which are pretrained, come from the first client that answers.

        Raises:
            ValueError: no client has sent them.
        """
        lora, engine = self.recipe.lora, self._engine
        drawn = drawn_adapters(self._anatomy, lora, self.recipe.seed)
        if "router" not in lora.targets:
            return drawn | self._start
        asked, due = engine.asked, Due(leaves=lambda *_: {"router": router_shapes(self._anatomy)})
        for client in self.clients:
            packages = {client: Bundle()}
            for reply in usable(engine.ask("router", packages), packages, due, {}, engine.listener.lost):
                engine.asked = asked  # it leaves no trace in the client's memory
                return drawn | reply.bundle.tree("router") | self._start
        raise ValueError("lora.targets: no client has sent the pretrained rows of its routers to begin with; start again")

    def close(self) -> None:
        """Let go of the clients."""
        self._engine.close()
        self._done()


def over(grid: Any, names: Mapping[int, str] | None = None, admitted: Callable[[str], bool] = lambda client: True) -> Connect:
    """The nodes of a Flower grid (`flwr.serverapp.Grid`), for `runner.run` and `runner.resume` inside a ServerApp.

    Args:
        grid: the grid.
        names: node -> the client that its key belongs to; without them a node is whoever it says it is.
        admitted: whether a client is let in at this moment; one that no longer is has left.
    """

    def connect(recipe: Recipe, folder: Path, run: str, listener: Listener) -> Afar:
        settings = recipe.engine
        if not isinstance(settings, FlowerSettings):
            raise ValueError(f"engine.name: {settings.name!r} does not run over sites elsewhere; set it to flower")
        departed = [card for card in origin.cards(folder) if not admitted(card.name)]
        known = {"names": names or {}, "admitted": admitted, "departed": departed}
        return Afar(recipe, _introduced(recipe, settings, listener, grid=grid, run=run, wanted=settings.clients, **known))

    return connect


def _in_simulation(recipe: Recipe, folder: Path, run: str, listener: Listener) -> Afar:
    """Flower's simulation, node i being client i of the recipe's rows; memories lie where they do in process."""
    from fedgraft.engine.simulation import Simulation

    settings = recipe.engine
    assert isinstance(settings, SimulationSettings)
    _refuse_local(recipe)
    clients = len(load_clients(recipe.data, recipe.seed))
    handle = HostHere(folder=str(folder.absolute()), threads=max(1, round(settings.cpus)))
    simulation = Simulation(settings, handle, clients)
    try:
        here = {"store": MemoryStore(folder / "clients"), "alive": simulation.check}
        engine = _introduced(recipe, settings, listener, grid=simulation.grid, run=run, wanted=clients, **here)
        return Afar(recipe, engine, simulation.close)
    except BaseException:
        simulation.close()
        raise


def _introduced(
    recipe: Recipe, settings: SimulationSettings | FlowerSettings, listener: Listener, *, wanted: int, **further: Any
) -> GridEngine:
    """An engine whose clients have introduced themselves."""
    _refuse_local(recipe)
    engine = GridEngine(
        recipe=recipe.model_dump(mode="json", exclude_unset=True, exclude={"engine": True, "lora": {"init"}}),
        listener=listener,
        wanted=wanted,
        wait_seconds=settings.wait_seconds,
        deadline_seconds=settings.deadline_seconds,
        **further,
    )
    engine.introduce()
    return engine


def _refuse_local(recipe: Recipe) -> None:
    """What takes rows or files of this process."""
    if recipe.selection.file is not None:
        raise ValueError("selection.file: clients behind an engine never see that file; remove it, or run with engine.name: inprocess")
    if recipe.build_method().pooled:
        raise ValueError(
            f"engine.name: method {recipe.method.name!r} pools the clients' rows, which stay where they are; set it to inprocess"
        )


def _only_on(recipe: Recipe, folder: Path, run: str, listener: Listener) -> Afar:
    raise ValueError("engine.name: 'flower' runs over sites elsewhere; start it with: fedgraft run RECIPE --on NAME")


def connecting(settings: EngineSettings) -> Connect:
    """How the clients of a recipe's engine are reached."""
    return CONNECT[settings.name]


CONNECT: dict[str, Connect] = {"inprocess": Here, "flower-simulation": _in_simulation, "flower": _only_on}
