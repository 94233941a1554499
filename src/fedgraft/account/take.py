"""The account of a run: what is trained, what travels, what stays, and what it costs. From shapes alone, so the meta device will do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedgraft import address, words
from fedgraft.account.compute import Compute, compute_of
from fedgraft.account.layers import Layer, alike, layers_of
from fedgraft.account.memory import Memory, Workload, memory_of
from fedgraft.grafts.graft import adapter_shapes
from fedgraft.grafts.lora import LoraSettings, Shapes, chosen_projections
from fedgraft.grafts.side_expert import GraftSettings, side_shapes
from fedgraft.methods.method import Method
from fedgraft.moe.family import Anatomy
from fedgraft.tree import Predicate

ON_WIRE = {"fp32": 4, "bf16": 2}
"""Bytes of an entry: leaves travel in fp32; bf16 is what compressing to 16 bits would make of it."""
CONSTANT: tuple[Predicate, ...] = (address.nothing, address.everything)


@dataclass(frozen=True, kw_only=True)
class Leaves:
    """Entries of a set of trained leaves."""

    places: dict[str, int]
    """By place: `attention`, `side`, ..."""
    layers: dict[int, int]

    @property
    def total(self) -> int:
        """Entries of all."""
        return sum(self.places.values())


@dataclass(frozen=True, kw_only=True)
class Account:
    """What training a model by a method means."""

    model_type: str
    parameters: int
    """Of the model, tied ones once, all frozen."""
    layers: list[Layer]
    """Like layers together."""
    shared: Leaves
    """Leaves that travel: in each round down to a client and, trained, up."""
    personal: Leaves
    """Leaves that never leave the client."""
    names: tuple[str, ...]
    """Linear layers that are adapted, `place name` each once."""
    grafts: int
    """Grafted experts per MoE layer."""
    frozen_graft: int
    """Entries of one client's grafted experts, which alias their source experts."""
    compute: Compute
    memory: Memory
    work: Workload
    down: int
    """Entries that travel down in a round for the shared ones, at most, a copy of each."""
    wire_copies: int = 1
    """Numbers that travel each way for every shared one."""
    passes: int = 1
    """Times that a client goes over the batches of a round."""
    pooled: bool = False
    """One site holds the clients' training rows."""

    @property
    def trained(self) -> int:
        """Entries that a client trains."""
        return self.shared.total + self.personal.total

    def bytes_up(self, kind: str = "fp32") -> int:
        """Bytes of leaves that a client sends in a round; message headers, a few kB, come on top."""
        return self.shared.total * self.wire_copies * ON_WIRE[kind]

    def bytes_down(self, kind: str = "fp32") -> int:
        """Bytes of leaves that it is sent, at most."""
        return self.down * self.wire_copies * ON_WIRE[kind]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        values = asdict(self)
        for leaves in (values["shared"], values["personal"]):
            leaves["layers"] = {str(number): entries for number, entries in leaves["layers"].items()}
        values["trained"] = self.trained
        values["bytes_up"], values["bytes_down"] = ({kind: count(kind) for kind in ON_WIRE} for count in (self.bytes_up, self.bytes_down))
        values["compute"] |= {"base": self.compute.base, "grafted": self.compute.grafted}
        values["memory"] |= {"training": self.memory.training, "total": self.memory.total}
        return values


def take_account(anatomy: Anatomy, method: Method, lora: LoraSettings, graft: GraftSettings, work: Workload) -> Account:
    """Count.

    Raises:
        ValueError: a pattern matches nothing: a LoRA target, or what the method trains, shares or keeps.
    """
    adapters, side = _shapes(anatomy, method, lora, graft)
    chosen = chosen_projections(anatomy, lora.targets) if "adapters" in method.places else []
    shapes = method.leaves(adapters | side)
    own, common = _split(shapes, method)
    layers = layers_of(anatomy, {projection.path for projection in chosen}, common.layers, own.layers)
    grafts = graft.per_layer + method.shared_grafts if "side" in method.places else 0
    compute = compute_of(anatomy, layers, adapters, side, graft, work.length)
    parameters = sum(parameter.numel() for parameter in anatomy.model.parameters())
    config = anatomy.model.config.get_text_config()
    memory = memory_of(
        layers,
        work,
        parameters=parameters,
        trained=common.total + own.total,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        grafts=grafts,
        compute=compute,
    )
    return Account(
        model_type=str(config.model_type),
        parameters=parameters,
        layers=alike(layers),
        shared=common,
        personal=own,
        names=tuple(dict.fromkeys(f"{projection.place} {projection.name}" for projection in chosen)),
        grafts=grafts,
        frozen_graft=grafts * sum(layer.experts.parameters for layer in layers if layer.experts is not None),
        compute=compute,
        memory=memory,
        work=work,
        down=sum(math.prod(shape) for shape in method.down({key: shapes[key] for key in shapes if not method.personal(key)}).values()),
        wire_copies=method.wire_copies,
        passes=method.passes,
        pooled=method.pooled,
    )


def shared_shapes(anatomy: Anatomy, method: Method, lora: LoraSettings, graft: GraftSettings) -> Shapes:
    """The leaves that a client and the server share, at their largest.

    Raises:
        ValueError: a LoRA target does not exist.
    """
    adapters, side = _shapes(anatomy, method, lora, graft)
    return {key: shape for key, shape in method.leaves(adapters | side).items() if not method.personal(key)}


def _shapes(anatomy: Anatomy, method: Method, lora: LoraSettings, graft: GraftSettings) -> tuple[Shapes, Shapes]:
    """Leaves of the adapters and of the grafted experts, where the method has any."""
    adapters = adapter_shapes(anatomy, lora) if "adapters" in method.places else {}
    return adapters, side_shapes(anatomy, graft, lora, method.shared_grafts) if "side" in method.places else {}


def summary(account: Account) -> list[tuple[str, str]]:
    """The screen before training: (label, text) a line."""
    rows = [("trains", f"{words.count(account.trained)} parameters a client: {_places(account)}")]
    if account.passes > 1:
        rows.append(("", f"in {account.passes} passes over the batches of a round"))
    each, half = (_sizes(account, kind) for kind in ON_WIRE)
    travelling = f"{words.count(account.shared.total)} parameters ({_listed(account.shared)}), {each} per client and round"
    wire = f"{travelling} (bf16: {half})" if account.shared.total else "nothing"
    rows.append(("travels", "the clients' training rows, to one site" if account.pooled else wire))
    rows.append(("stays", _listed(account.personal, "on the client") if account.personal.total else "nothing of what is trained"))
    frozen = f"{words.count(account.parameters)} parameters of {account.model_type}, {account.work.dtype}"
    if account.grafts:
        frozen += f"; the grafts' own {words.count(account.frozen_graft)} are views of their source experts"
    rows.append(("frozen", frozen))
    return rows


def _sizes(account: Account, kind: str) -> str:
    up, down = account.bytes_up(kind), account.bytes_down(kind)
    unit = " fp32" if kind == "fp32" else ""
    if up == down:
        return f"{words.size(up)}{unit} each way" if unit else words.size(up)
    return f"{words.size(up)}{unit} up and at most {words.size(down)} down"


def _split(shapes: Shapes, method: Method) -> tuple[Leaves, Leaves]:
    """(personal, shared) by the method's predicate, of what it trains.

    Raises:
        ValueError: there is nothing to train, or the predicate takes all leaves or none though it is a pattern.
    """
    if not shapes:
        where = ", ".join(sorted(method.places)) or "no place"
        raise ValueError(f"this method trains nothing in this model: it has leaves at {where}; use another method.name")
    personal = {key for key in shapes if method.personal(key)}
    if method.personal not in CONSTANT and len(personal) in {0, len(shapes)}:
        found = ", ".join(sorted({address.place_of(key) for key in shapes}))
        what = "would stay on the client" if not personal else "would travel"
        raise ValueError(f"of the leaves this method trains ({found}) none {what}; use another method.name or other options of it")
    trained = {key for key in shapes if not method.frozen(key)}
    return _leaves(shapes, trained & personal), _leaves(shapes, trained - personal)


def _leaves(shapes: Shapes, keys: set[str]) -> Leaves:
    places, layers = Counter[str](), Counter[int]()
    for key, shape in shapes.items():
        if key in keys:
            places[address.place_of(key)] += math.prod(shape)
            layers[address.layer_of(key)] += math.prod(shape)
    return Leaves(places=dict(places), layers=dict(layers))


WORDS: Mapping[str, str] = {
    "attention": "attention LoRA",
    "mixer": "mixer LoRA",
    "shared": "shared-expert LoRA",
    "linear": "LoRA on other linear layers",
    "expert": "routed-expert LoRA",
    "router": "router rows",
    "side": "grafted experts",
    "own": "second LoRA",
}
"""Places for people."""


def _places(account: Account) -> str:
    parts = []
    for place in dict.fromkeys([*account.shared.places, *account.personal.places]):
        names = [name.partition(" ")[2] for name in account.names if name.partition(" ")[0] == place]
        layers = sum(len(layer.numbers) for layer in account.layers if layer.experts is not None)
        detail = f" {', '.join(names)}" if names and place != "linear" else ""
        parts.append(
            f"{account.grafts} grafted expert{'s' * (account.grafts > 1)} in each of {layers} layers"
            if place == "side"
            else f"{WORDS[place]}{detail}"
        )
    return "; ".join(parts)


def _listed(leaves: Leaves, end: str = "") -> str:
    parts = [f"{WORDS[place]} {words.count(number)}" if end else WORDS[place] for place, number in leaves.places.items()]
    return f"{', '.join(parts)} {end}".rstrip()
