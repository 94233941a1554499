"""The frame of every method: five fields and a few steps, whose defaults spell FedAvg (McMahan et al. 2017).

A method is a frozen value; `build(**options)` in its own file returns one and states only what differs. Steps are plain functions that take
the method first, the server's (`open`, `round`, `pack`, `absorb`, `finalize`) above the client's (`graft`, `fresh`, `train`, `finish`,
`answer`). State lives in `server.state` and `client.memory` alone. Before a run, `settle` takes up what only the model and the
clients decide and refuses what the method cannot do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from fedgraft.address import is_residual, nothing, within
from fedgraft.aggregation.merges import Difference, Merge, Update, by_examples
from fedgraft.aggregation.replies import Form, as_packed, no_leaves
from fedgraft.aggregation.server import Ask, Reply, Server
from fedgraft.aggregation.server_steps import ServerStep, replace
from fedgraft.bundle import Bundle, Fact
from fedgraft.grafts.graft import Experts, adapter_shapes
from fedgraft.grafts.lora import LoraSettings, Shapes
from fedgraft.moe.family import Anatomy
from fedgraft.selection.prepared import Wanted, prepared_choice
from fedgraft.selection.select import Choice, select_experts
from fedgraft.training.client import Client
from fedgraft.training.local_rules import LocalRule, plain
from fedgraft.tree import Predicate, Tree, combine, partition

RowShares: TypeAlias = Callable[[Sequence[Sequence[int]]], Tensor]
"""The prompts of some rows as token ids -> one share in [0, 1] for each [rows]; no leaves are in use meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How a client predicts: the leaves in use and the source experts of its grafts."""

    tree: Tree
    experts: Experts
    shares: RowShares | None = None
    """The share of the second pairs for each row, in the place of one for all."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a method meets in a run."""

    shapes: Shapes
    """The leaves of everything in `lora.targets`."""
    lora: LoraSettings
    clients: list[str]


def unchanged(shapes: Shapes) -> Shapes:
    """All leaves at the method's places, no others."""
    return shapes


def as_built(method: Method, surroundings: Surroundings) -> Method:
    """Nothing is left to decide."""
    return method


def open_run(method: Method, server: Server, ask: Ask) -> None:
    """First state: fresh shared leaves; a method with side experts has every client choose and grow its own."""
    shared, _ = partition(server.fresh_shared() if "adapters" in method.places else {}, lambda key: not method.personal(key))
    server.state = Bundle(trees={"shared": shared})
    if "side" in method.places:
        for _ in ask("graft", {client: server.package() for client in server.present()}):
            pass


def federated_round(method: Method, server: Server, ask: Ask) -> None:
    """One communication round: the sampled clients train, their updates become the new state."""
    packages = {client: method.pack(method, server, client) for client in server.sampled()}
    method.absorb(method, server, ask("train", packages))


def pack_shared(method: Method, server: Server, client: str) -> Bundle:
    """The shared leaves."""
    return server.package({"shared": server.state.tree("shared")})


def absorb_updates(method: Method, server: Server, replies: Iterator[Reply]) -> None:
    """Merge the replies as they come and take the server step; no reply leaves the state as it is."""
    shared = server.state.tree("shared")

    def updates() -> Iterator[Update]:
        for reply in replies:
            examples = reply.bundle.facts["examples"]
            assert isinstance(examples, int)
            try:
                delta = Difference(reply.bundle.tree("shared"), shared)
            except ValueError as error:
                raise ValueError(f"client {reply.client!r}: {error}") from error
            yield Update(client=reply.client, delta=delta, examples=examples)

    delta = method.merge.run(updates())
    server.state = method.step(server.state, delta)


def grow_graft(method: Method, client: Client, package: Bundle) -> Bundle:
    """Choose the source experts on the client's own text and start its graft from them; replies with the choice alone."""
    choice = choose_experts(client)
    mixture = {"mixture": choice.mixture} if choice.mixture else {}
    client.remember(trees={}, facts={"experts": choice.experts, **mixture})
    client.remember(trees={"personal": personal_leaves(method, client)})
    return Bundle(facts={"experts": choice.experts, "errors": choice.errors, "calibration_tokens": choice.tokens})


def choose_experts(client: Client) -> Choice:
    """The source experts of its own grafts, by the recipe's criterion and text, or as they were chosen beforehand."""
    graft, base, settings = client.model.graft_settings, client.model.base, client.selection
    if settings.file is not None:
        wanted = Wanted(base=base, data=client.data, settings=settings, per_layer=graft.per_layer, mixture=graft.mixture)
        return prepared_choice(Path(settings.file), wanted)
    return select_experts(
        base,
        client.calibration(),
        settings,
        graft.per_layer,
        client.seed,
        client.name,
        client.report,
        mixture=graft.mixture,
        known=client.generic if settings.text == "generic" else None,
    )


def personal_leaves(method: Method, client: Client) -> Tree:
    """The client's own leaves: those it remembers, else fresh ones; a client that has not chosen its experts yet has no grafts."""
    if "personal" in client.memory.trees:
        return client.memory.tree("personal")
    return partition(method.fresh(method, client), method.personal)[0]


def fresh_leaves(method: Method, client: Client) -> Tree:
    """New leaves of the method's places, shared ones included."""
    fresh: Tree = {}
    if "adapters" in method.places:
        fresh |= client.model.fresh_adapters(client.seed)
    if "side" in method.places and client.experts:
        fresh |= client.model.fresh_side(client.experts, client.seed, client.mixture)
    return fresh


def train_round(method: Method, client: Client, package: Bundle) -> Bundle:
    """Train shared and personal leaves together; remember both, send the shared ones but residuals, which stay as they came."""
    chosen: dict[str, Fact] = {}
    if "side" in method.places:
        if not client.experts:  # it was away when the others chose
            chosen = method.graft(method, client, package).facts
        chosen = {"experts": client.experts, **chosen}  # told in every round, since any reply may be lost
    start = combine(package.tree("shared"), personal_leaves(method, client))
    round_number, lr = package.facts["round"], package.facts["lr"]
    assert isinstance(round_number, int)
    assert isinstance(lr, float)
    result = method.local(client, start, round_number, lr)
    personal, shared = partition(result.tree, method.personal)
    moments = {f"moments.{name}": tree for name, tree in result.moments.items()}
    client.remember(trees={"personal": personal, "trained": shared, **moments})
    facts: dict[str, Fact] = {
        "examples": client.examples,
        "loss": result.loss,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "truncated": client.truncated,
        **chosen,
    }
    return Bundle(trees={"shared": partition(shared, is_residual)[1]}, facts=facts)


def nothing_to_finish(method: Method, client: Client, package: Bundle) -> Bundle:
    """The client is as the last round left it."""
    return Bundle()


def answer_as(method: Method, client: Client, package: Bundle) -> dict[str, Prediction]:
    """The models to evaluate on a client.

    `base`: no leaves. `shared`: the aggregated leaves without the personal ones, where a method has both and they do without. `trained`:
    personal and shared leaves as local training left them, before aggregation. `personal`: the client's own leaves with the aggregated
    ones, the method's product.
    """
    shared, personal = package.tree("shared"), personal_leaves(method, client)
    models = {"base": Prediction(tree={}, experts=[])}
    if shared and personal and whole(shared):
        models["shared"] = Prediction(tree=shared, experts=[])
    if client.memory.tree("trained"):
        models["trained"] = Prediction(tree=combine(client.memory.tree("trained"), personal), experts=client.experts)
    models["personal"] = Prediction(tree=combine(shared, personal), experts=client.experts)
    return models


def whole(tree: Tree) -> bool:
    """No low-rank pair in it lacks a factor."""
    heads = {part: {key[:-2] for key in tree if key.endswith(part)} for part in (".A", ".B")}
    return heads[".A"] == heads[".B"]


ServerHalf: TypeAlias = Callable[["Method", Server, Ask], None]
ClientHalf: TypeAlias = Callable[["Method", Client, Bundle], Bundle]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A federated method; the defaults are FedAvg on the attention LoRA."""

    places: frozenset[str] = frozenset({"adapters"})
    """Where it has leaves: `adapters`, `side`."""
    leaves: Callable[[Shapes], Shapes] = unchanged
    """What it trains and keeps, of the leaves at its places."""
    personal: Predicate = nothing
    """Leaves that never leave the client."""
    frozen: Predicate = nothing
    """Leaves that stay as the run began with them."""
    shared_grafts: int = 0
    """Grafted experts per layer beside those that the recipe counts (`graft.per_layer`)."""
    targets: frozenset[str] = frozenset()
    """Names that `lora.targets` must hold for the method to do what its options say."""
    local: LocalRule = plain
    """How a client trains."""
    merge: Merge = by_examples
    """Many replies -> one delta."""
    step: ServerStep = replace
    """Delta -> new state."""
    pooled: bool = False
    """One site holds all clients' training rows, which leave them; each client is evaluated on its own rows as ever."""
    wire_copies: int = 1
    """Numbers that travel each way for every shared one."""
    down: Callable[[Shapes], Shapes] = unchanged
    """What the server sends for the shared leaves, at its largest; a client sends the shared leaves themselves."""
    passes: int = 1
    """Times that a client goes over the batches of a round, forward and backward."""
    sent: Form = as_packed
    """The leaves that a reply to `train` must hold; another one is lost."""
    grown: Form = no_leaves
    """Those of a reply to `graft`."""
    row_wise: bool = False
    """Rows are predicted in ways of their own, by their prompts: its `Prediction` has `shares`."""
    needs_mean: str = ""
    """Why its replies must be averaged; empty: `federation.merge` may set another rule in the place of a mean."""
    merges_changes: bool = True
    """Its merge takes what each client has changed of its package; else whole leaves, which hold what the client started from."""
    settle: Callable[[Method, Surroundings], Method] = as_built
    open: ServerHalf = open_run
    round: ServerHalf = federated_round
    pack: Callable[[Method, Server, str], Bundle] = pack_shared
    absorb: Callable[[Method, Server, Iterator[Reply]], None] = absorb_updates
    finalize: ServerHalf | None = None
    """Asked once after the last round; again when a finished run is extended."""
    graft: ClientHalf = grow_graft
    fresh: Callable[[Method, Client], Tree] = fresh_leaves
    train: ClientHalf = train_round
    finish: ClientHalf = nothing_to_finish
    answer: Callable[[Method, Client, Bundle], dict[str, Prediction]] = answer_as

    @property
    def sections(self) -> frozenset[str]:
        """Recipe sections that have a meaning for this method, beyond those of every run."""
        attention = {"lora"} if self.places else set()
        return frozenset(attention | ({"graft", "selection"} if "side" in self.places else set()))


def settled(method: Method, anatomy: Anatomy, lora: LoraSettings, clients: list[str]) -> Method:
    """The method for one model and its clients.

    Raises:
        ValueError: a LoRA target does not exist, or the method cannot do what it was asked to; names the choices.
    """
    shapes = adapter_shapes(anatomy, lora) if "adapters" in method.places else {}
    return method.settle(method, Surroundings(shapes=shapes, lora=lora, clients=clients))


def questions(method: Method) -> dict[str, Callable[[Client, Bundle], Bundle]]:
    """What a client can be asked, by name, but to evaluate."""
    return {"graft": partial(method.graft, method), "train": partial(method.train, method), "finish": partial(method.finish, method)}


side_only = within("side")
"""Predicate: the leaves of the grafted experts and their gates."""
