"""FLEx (arXiv 2506.00965): attention LoRA is averaged; each client keeps an expert of its own per layer, grafted beside the frozen ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fedgraft.address import place_of, side_number
from fedgraft.aggregation.replies import no_leaves
from fedgraft.aggregation.server import Ask, Reply, Server
from fedgraft.bundle import Bundle, Fact
from fedgraft.grafts.lora import Shapes
from fedgraft.methods.method import Method, Prediction, answer_as, choose_experts, open_run, personal_leaves, train_round
from fedgraft.training.client import Client
from fedgraft.training.personal_rules import around
from fedgraft.tree import Predicate, Tree, partition


def build(shared_graft: bool = False, private_router: bool = False, frozen_shared: bool = False) -> Method:
    """Side experts and their gates stay on the client; the rest is FedAvg. Without any graft it is the method `fedavg`.

    Args:
        shared_graft: beside its own, every client carries one further grafted expert per layer, the same for all, sent and averaged. It
            starts from the expert that is the first choice of most clients (ties to the lowest).
        private_router: the router's rows are trained and stay on the client; `lora.targets` must name `router`.
        frozen_shared: the shared leaves stay as they begin (`lora.init`), nothing is sent, and graft and gate alone are trained.
    """
    if shared_graft and frozen_shared:
        raise ValueError("method.frozen_shared: a shared graft is trained by all clients, so it can't be frozen; leave one of them out")
    kept = Method(
        places=frozenset({"adapters", "side"}),
        personal=lambda key: (
            (place_of(key) == "side" and not (shared_graft and _is_common(key))) or (private_router and place_of(key) == "router")
        ),
        targets=frozenset({"router"} if private_router else ()),
    )
    if frozen_shared:
        return replace(kept, frozen=_not(kept.personal), local=around(_not(kept.personal)), sent=no_leaves, train=train_own, absorb=hear)
    if not shared_graft:
        return kept
    return replace(
        kept,
        shared_grafts=1,
        grown=first_leaves,
        open=open_common,
        pack=pack_common,
        graft=choose_first,
        train=train_with_common,
        answer=answer_with_common,
    )


def _is_common(key: str) -> bool:
    """The shared graft is the first of its layer."""
    return place_of(key) == "side" and side_number(key) == 0


def _not(predicate: Predicate) -> Predicate:
    return lambda key: not predicate(key)


def train_own(method: Method, client: Client, package: Bundle) -> Bundle:
    """As every method; the shared leaves, which are what they were, are not sent back."""
    return Bundle(facts=train_round(method, client, package).facts)


def hear(method: Method, server: Server, replies: Iterator[Reply]) -> None:
    """Nothing is merged."""
    list(replies)  # they are pulled one by one


def open_common(method: Method, server: Server, ask: Ask) -> None:
    """Every client chooses; the common expert is elected; its first leaves come from one client, since only clients hold the base."""
    choices: dict[str, Any] = {}

    def listening(question: str, packages: dict[str, Bundle]) -> Any:
        for reply in ask(question, packages):
            if "experts" in reply.bundle.facts:
                choices[reply.client] = reply.bundle.facts["experts"]
            yield reply

    open_run(method, server, listening)
    if not choices:
        raise ValueError("method.shared_graft: no client has answered, so there is no expert to begin with; start again when one is there")
    depth, _ = Counter(map(len, choices.values())).most_common(1)[0]  # a client that tells of other layers than the others has no vote
    common = elect([choice for choice in choices.values() if len(choice) == depth])
    for client in choices:
        for reply in ask("graft", {client: server.package(common=common)}):
            shared = {**server.state.tree("shared"), **reply.bundle.tree("shared")}
            server.state = Bundle(trees={"shared": shared}, facts={"common": common})
            return
    raise ValueError("method.shared_graft: no client has sent the first leaves of the shared graft; start again")


def first_leaves(shapes: Shapes, package: Bundle, reply: Bundle) -> Mapping[str, Shapes]:
    """Those of the shared graft, where the client is told which expert it starts from."""
    return {"shared": {key: shape for key, shape in shapes.items() if _is_common(key)}} if "common" in package.facts else {}


def elect(choices: list[list[list[int]]]) -> list[int]:
    """Per layer the expert that is the first choice of most clients, ties to the lowest; choices [clients][L][r]."""
    ballots = (Counter(chosen[0] for chosen in layer) for layer in zip(*choices, strict=True))
    return [min(votes, key=lambda expert: (-votes[expert], expert)) for votes in ballots]


def pack_common(method: Method, server: Server, client: str) -> Bundle:
    """The shared leaves, and the source of the shared graft."""
    return server.package({"shared": server.state.tree("shared")}, common=server.state.facts["common"])


def choose_first(method: Method, client: Client, package: Bundle) -> Bundle:
    """Choose the client's own experts; asked again with the common one, grow the grafts and reply with the shared one's first leaves."""
    if not client.experts:
        choice = choose_experts(client)
        facts = {"experts": choice.experts, "errors": choice.errors, "calibration_tokens": choice.tokens}
        client.remember(trees={}, facts={"experts": choice.experts, "mixture": choice.mixture, "choice": facts})
    told: Any = client.memory.facts["choice"] or {}
    first: Tree = {}
    if "common" in package.facts:
        join(method, client, package)
        first, _ = partition(client.model.fresh_side(client.experts, client.seed, client.mixture), _is_common)
    return Bundle(trees={"shared": first} if first else {}, facts=told)


def join(method: Method, client: Client, package: Bundle) -> dict[str, Fact]:
    """Take the common expert before the client's own, once; its first personal leaves follow from that. Gives what it chose only now."""
    told = {} if client.experts else choose_first(method, client, Bundle()).facts  # it was away when the others chose
    if "personal" not in client.memory.trees:
        common: Any = package.facts["common"]
        client.remember(trees={}, facts={"experts": [[first, *own] for first, own in zip(common, client.experts, strict=True)]})
        client.remember(trees={"personal": personal_leaves(method, client)}, facts={"choice": None})
    return told


def train_with_common(method: Method, client: Client, package: Bundle) -> Bundle:
    """As every method, with both grafts; tells the choice of its own."""
    told = join(method, client, package)
    reply = train_round(method, client, package)
    return Bundle(trees=reply.trees, facts={**reply.facts, "experts": [own for _, *own in client.experts], **told})


def answer_with_common(method: Method, client: Client, package: Bundle) -> dict[str, Prediction]:
    """As every method; the aggregated leaves alone have the shared graft among them."""
    grown = replace(client)  # so that being evaluated leaves no trace in the memory
    join(method, grown, package)
    models = answer_as(method, grown, package)
    return {name: replace(model, experts=grown.experts) if model.tree else model for name, model in models.items()}
