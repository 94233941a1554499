"""What a process that holds rows and the base model does for a run: `Holdings` in the process of the run, `Host` behind bytes on a site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from fedgraft import __version__
from fedgraft.address import place_of
from fedgraft.bundle import Bundle
from fedgraft.data.clients import Clients, check_rows
from fedgraft.data.partition import SAFE_NAME, ClientData, pooled
from fedgraft.engine.card import Card
from fedgraft.engine.site import Site
from fedgraft.engine.wire import ECHOED, Frame
from fedgraft.evaluation.gather import site_questions
from fedgraft.evaluation.unseen import held_out
from fedgraft.grafts.graft import GraftedModel
from fedgraft.handover.start import start_of
from fedgraft.methods.method import Method, settled
from fedgraft.moe.load import Base, load_base
from fedgraft.moe.memory import means_out_of_memory
from fedgraft.recipe import Recipe, check_values
from fedgraft.selection.profile import Profile
from fedgraft.training.client import Client, MemoryStore, Report, unheard
from fedgraft.training.fit import NotFiniteError
from fedgraft.training.settings import TrainingSettings
from fedgraft.transforms.attack import attacking
from fedgraft.transforms.chain import Sending
from fedgraft.tree import Tree


def training_of(recipe: Recipe, method: Method, clients: int) -> TrainingSettings:
    """How a site trains in a run of so many clients."""
    return recipe.training.for_pool(recipe.federation.clients_of(clients)) if method.pooled else recipe.training


class Holdings:
    """Rows, base model and memories in one process, for one run. Rows are read at once, the model when it is first needed."""

    def __init__(
        self, recipe: Recipe, memories: Path, hear: Callable[[str], Report] = lambda client: unheard, discreet: bool = False
    ) -> None:
        """Read the rows.

        Args:
            recipe: the run.
            memories: folder of the client memories.
            hear: called with a client's name when it is opened; what it returns hears how far it is.
            discreet: as `Sending.discreet`.

        Raises:
            ValueError: the rows cannot be read, or a client has none to be evaluated on.
        """
        self.recipe, self.memories, self.hear = recipe, memories, hear
        self.sending = Sending(
            privacy=recipe.privacy,
            compression=recipe.compression,
            secure=recipe.secure_aggregation,
            seed=recipe.seed,
            memories=memories,
            discreet=discreet,
        )
        self.method = recipe.build_method()
        self.clients = Clients(recipe.data, recipe.seed)
        self.rows = {name: outline.rows for name, outline in self.clients.outlines.items()}
        check_rows(self.rows, recipe.evaluation.split)
        self.unseen: list[str] = []
        self.generic: list[Profile] = []

    def hold_out(self) -> None:
        """Keep the unseen clients out of the federation; for a process that holds the rows of all clients.

        Raises:
            ValueError: as `held_out`, or choices made beforehand would know more rows of them than they are given.
        """
        if self.recipe.selection.file is not None and self.recipe.evaluation.unseen.clients:
            raise ValueError("selection.file: unseen clients choose by their first rows, in the run; leave out one of the two")
        rows = {name: rows["train"] for name, rows in self.rows.items()}
        self.unseen = held_out(self.recipe.evaluation.unseen, rows, self.method, self.recipe.seed)

    @cached_property
    def federated(self) -> list[str]:
        """Names of the clients of the federation."""
        unseen = frozenset(self.unseen)
        return [name for name in self.clients if name not in unseen]

    @cached_property
    def sites(self) -> list[str]:
        """Names of who trains."""
        return list(self.pool) if self.method.pooled else self.federated

    @cached_property
    def pool(self) -> dict[str, ClientData]:
        """The one site of a method that pools the clients' rows."""
        return pooled({name: self.clients[name] for name in self.federated}) if self.method.pooled else {}

    @cached_property
    def base(self) -> Base:
        """The base model.

        Raises:
            ValueError: as `load_base`.
        """
        return load_base(self.recipe.model)

    @cached_property
    def start(self) -> Tree:
        """The leaves that `lora.init` names, by `start_of`; empty without."""
        return start_of(self.recipe.lora, self.base, self.base.digest, self.recipe.seed)

    @cached_property
    def model(self) -> GraftedModel:
        """The base with its places for leaves.

        Raises:
            ValueError: a LoRA target does not exist.
        """
        return GraftedModel(self.base, self.recipe.lora, self.recipe.graft, lambda: self.start)

    def site(self, names: Sequence[str], lends: bool = False) -> Site:
        """The client's half of the run.

        Args:
            names: all its clients, those of other processes too.
            lends: whether all clients are one party, so that one may lend its personal model to others, or attack them.

        Raises:
            ValueError: the method cannot do what it was asked to on this model.
        """
        method = settled(self.method, self.base, self.recipe.lora, list(names))
        questions = site_questions(method, self.recipe.evaluation, self.memories.parent / "evaluation", lends)
        if lends:
            questions["train"] = attacking(self.recipe.attack, self.federated, self.recipe.seed, questions["train"])
        return Site(
            questions=self.sending.questions(questions, method.merge.weight) | {"router": _router},
            open_client=self.open,
            store=MemoryStore(self.memories),
        )

    def open(self, name: str) -> Client:
        """A client without its memory."""
        recipe = self.recipe
        return Client(
            data=self.pool[name] if name in self.pool else self.clients[name],
            model=self.model,
            seed=recipe.seed,
            data_settings=recipe.data,
            training=recipe.training if name in self.unseen else training_of(recipe, self.method, len(self.federated)),
            selection=recipe.selection,
            report=self.hear(name),
            generic=self.generic,
        )

    def card(self, name: str) -> Card:
        """How a client introduces itself."""
        known, hidden = self.clients.outlines[name], self.sending.hides_rows
        return Card(
            name=name,
            rows={} if hidden else known.rows,
            categories={} if hidden else known.categories,
            data_digest=self.sending.digest(name, known.digest),
            base_digest=self.base.digest,
            base_notes=tuple(self.base.notes),
            device=str(self.base.device),
            threads=torch.get_num_threads(),
            fedgraft=__version__,
        )


def _router(client: Client, package: Bundle) -> Bundle:
    """The pretrained rows of the routers, which a coordinator without weights cannot copy."""
    fresh = client.model.fresh_adapters(client.seed)
    return Bundle(trees={"router": {key: leaf for key, leaf in fresh.items() if place_of(key) == "router"}})


@dataclass
class Host:
    """Answers requests as bytes. The base model and the rows stay in memory from one request to the next of the same run.

    Every request carries the run's recipe, so that a host which was started anew, or never saw the run join, can answer.
    """

    memories: Callable[[str], Path]
    """Where the client memories of a run, given by its id, lie."""
    model: dict[str, Any] = field(default_factory=dict)
    """Keys of the recipe's section `model` that are the site's own."""
    data: dict[str, Any] = field(default_factory=dict)
    """Keys of the recipe's section `data` that are the site's own."""
    discreet: bool = False
    """As `Sending.discreet`."""
    _held: tuple[object, Holdings] | None = None
    _site: tuple[object, Site] | None = None

    def handle(self, request: bytes, partition: int | None = None) -> bytes:
        """The response to a request; what a user can mend comes back as `refused` or `failed` with its reason, a bug is raised.

        Args:
            request: an encoded `Frame` of kind `join` {run, recipe}, `ask` {run, recipe, clients, question, client, asked, committed} with
                the package as content, or `leave` {run}.
            partition: which of the clients that the rows make this node is, by place; None where they make one.
        """
        return self.respond(request, partition).encode()

    def respond(self, request: bytes, partition: int | None = None) -> Frame:
        """`handle`, before encoding."""
        answers = {"join": self._join, "ask": self._ask, "leave": self._leave}
        try:
            frame = Frame.decode(request, "the coordinator's request")
            if frame.kind not in answers:
                raise ValueError(f"request {frame.kind!r} is unknown here; install the fedgraft version of the coordinator")
            return answers[frame.kind](frame, partition)
        except NotFiniteError as error:
            return Frame(kind="failed", facts={"reason": str(error)})
        except (ValueError, OSError) as error:
            return Frame(kind="refused", facts={"reason": str(error)})
        except (MemoryError, RuntimeError) as error:
            if not means_out_of_memory(error):
                raise
            return Frame(kind="refused", facts={"reason": f"out of memory ({(str(error).splitlines() or ['no more is known'])[0][:200]})"})

    def _join(self, frame: Frame, partition: int | None) -> Frame:
        holdings = self.holdings(frame)
        names = sorted(holdings.clients)
        if partition is None and len(names) > 1:
            raise ValueError(
                f"the rows here make {len(names)} clients ({', '.join(names[:3])}, ...) and a site is one of them; "
                "set the site's data.path to a file or folder of its own"
            )
        if partition is not None and partition >= len(names):
            raise ValueError(
                f"this is node {partition}, counted from 0, and the recipe's data make {len(names)} clients; start fewer nodes"
            )
        card = holdings.card(names[partition or 0])
        _ = holdings.model  # what cannot work fails before the first round
        return Frame(kind="card", facts={"card": card.as_facts()})

    def _ask(self, frame: Frame, partition: int | None) -> Frame:
        facts, holdings = frame.facts, self.holdings(frame)
        if facts["client"] not in holdings.clients:
            raise ValueError(f"client {facts['client']!r} is not at this site, which holds {', '.join(sorted(holdings.clients))}")
        key = (holdings, tuple(facts["clients"]))
        if self._site is None or self._site[0] != key:
            self._site = (key, holdings.site(facts["clients"]))
        asked, committed = int(facts["asked"]), int(facts["committed"])
        content = self._site[1].answer(facts["question"], facts["client"], frame.content, asked=asked, committed=committed)
        return Frame(kind="reply", facts={name: facts[name] for name in ECHOED}, content=content)

    def _leave(self, frame: Frame, partition: int | None) -> Frame:
        self._held = self._site = None
        return Frame(kind="left")

    def holdings(self, frame: Frame) -> Holdings:
        """What is held for the run of a request; that of another run is dropped, its memories stay on disk.

        Raises:
            ValueError: the run's id is no name for a folder, or the recipe or the rows cannot be read.
        """
        run, values = str(frame.facts["run"]), frame.facts["recipe"]
        if not SAFE_NAME.fullmatch(run):
            raise ValueError(f"the run's id {run!r} cannot name a folder")
        if self._held is None or self._held[0] != (run, values):
            self._held = self._site = None  # before the next base is loaded
            recipe = check_values(self.own(values), "the coordinator's recipe")
            if recipe.lora.init is not None:  # a folder of another machine; here it would be one of the site's
                raise ValueError("lora.init: a site reads no folder that a coordinator names; install the coordinator's fedgraft version")
            if recipe.selection.file is not None:
                raise ValueError("selection.file: a site reads no file that a coordinator names; leave it out of the recipe")
            self._held = ((run, values), Holdings(recipe, self.memories(run), discreet=self.discreet))
        return self._held[1]

    def own(self, values: dict[str, Any]) -> dict[str, Any]:
        """A recipe with the site's own keys in the place of the coordinator's; a section that is none is left to be refused."""
        sections = {"model": self.model, "data": self.data}
        asked = {name: values.get(name) or {} for name in sections}
        return {**values, **{name: {**asked[name], **own} for name, own in sections.items() if isinstance(asked[name], dict)}}


@dataclass(frozen=True)
class HostHere:
    """A `Host.handle` that can be sent to another process of this machine; there, one host answers for all clients of a run folder."""

    folder: str
    threads: int
    """Torch threads, where the recipe names no number."""

    def __call__(self, request: bytes, partition: int | None) -> bytes:
        """The response to a request."""
        return _host(self).handle(request, partition)


@cache
def _host(here: HostHere) -> Host:
    torch.set_num_threads(here.threads)
    return Host(memories=lambda run: Path(here.folder) / "clients")
