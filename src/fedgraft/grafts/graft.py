"""The grafted model: one frozen base in memory, into which any client's leaves are swapped by pointer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fedgraft.grafts.expert_lora import ExpertPairs, expert_shapes
from fedgraft.grafts.lanes import FittedLanes, Lane
from fedgraft.grafts.lora import LoraSettings, LowRank, Pairs, Shapes, Terms, chosen_projections, fresh_pairs, low_rank_shapes
from fedgraft.grafts.router import RouterRows, router_shapes
from fedgraft.grafts.rows import FittedRows, Rows
from fedgraft.grafts.side_expert import GraftSettings, Mixture, SeeGate, Side, SideExperts
from fedgraft.moe.family import Anatomy
from fedgraft.moe.load import Base
from fedgraft.moe.projections import Projection
from fedgraft.moe.weights import compute_device, plain, stored
from fedgraft.tree import Tree, clone, digest

PROBE_TOKENS = 16
Experts = list[list[int]]
"""Source expert of every graft, [L][r]; empty when a client has no graft."""


@dataclass(frozen=True)
class Fitted:
    """A client's leaves at their places, so that they can be put in use again without being looked up; without any it is the base."""

    low_rank: dict[str, Terms] = field(default_factory=dict)
    """By head of the addresses: what is added to the linear layer there."""
    router: dict[int, Tensor] = field(default_factory=dict)
    """By layer: the router's rows."""
    experts: dict[int, dict[int, Pairs]] = field(default_factory=dict)
    """By layer and expert: the pairs on it."""
    sides: dict[int, list[Side]] = field(default_factory=dict)
    """By layer: its grafts."""


FIELDS: dict[type, str] = {LowRank: "low_rank", RouterRows: "router", ExpertPairs: "experts", SideExperts: "sides"}
"""What holds leaves in use -> the field of `Fitted` that keeps them."""


class GraftedModel:
    """A base model with places for adapters and side experts. One tree is in use at a time; not thread-safe."""

    def __init__(self, base: Base, lora: LoraSettings, graft: GraftSettings, start: Callable[[], Tree] = dict) -> None:
        """Inject the adapters and register the hooks.

        Args:
            base: the frozen model.
            lora: sizes and places of the adapters.
            graft: what a side expert is.
            start: gives leaves that new ones are in the place of drawn ones; asked once, when the first are wanted.

        Raises:
            ValueError: a LoRA target does not exist.
        """
        self.base, self.lora_settings, self.graft_settings = base, lora, graft
        self._start = cache(start)
        self._frozen = dict(base.model.named_parameters())
        self._holders = {name: base.model.get_submodule(name.rpartition(".")[0]) for name in self._frozen}
        linears = [(projection.layer, base.model.get_submodule(projection.path)) for projection in base.projections]
        parts = [*linears, *((site.layer, site.experts) for site in base.sites)]  # a decoder layer lies on one device
        self._devices = {f"layers.{layer}": compute_device(part) for layer, part in parts}
        self._pairs: Shapes = low_rank_shapes(base, lora)
        self._adapters: list[LowRank | RouterRows | ExpertPairs] = [LowRank(base, lora)]
        self._router = RouterRows(base) if "router" in lora.targets else None
        if self._router is not None:
            self._adapters.append(self._router)
        if "experts" in lora.targets:
            self._pairs |= expert_shapes(base, lora)
            self._adapters.append(ExpertPairs(base, lora))
        self._side = SideExperts(base, graft, lora)
        self._named: dict[str, Any] = {FIELDS[type(part)]: part for part in (*self._adapters, self._side)}
        _check_they_run(base, chosen_projections(base, lora.targets))

    def fresh_adapters(self, seed: int) -> Tree:
        """New leaves of everything in `lora.targets`, on the CPU, the same on every site for the same seed and start."""
        drawn = fresh_pairs(self._pairs, seed) | (self._router.fresh() if self._router is not None else {})
        return drawn | clone(self._start())

    def fresh_side(self, experts: Experts, seed: int, mixture: Mixture = ()) -> Tree:
        """New leaves of the grafted experts and their gates, on the CPU; with a `mixture` of experts as their start."""
        return self._side.fresh(experts, seed, mixture)

    def placed(self, tree: Mapping[str, Tensor]) -> Tree:
        """The leaves where their layers compute; a leaf that is there already stays the same object."""
        inputs = self.base.device
        return {key: leaf.to(self._devices.get(".".join(key.split(".", 2)[:2]), inputs)) for key, leaf in tree.items()}

    @contextmanager
    def using(self, tree: Mapping[str, Tensor], experts: Experts) -> Iterator[None]:
        """Predict with `tree`, moved to its layers' devices, inside the block; the plain base model outside.

        Keep it open through `backward`: with gradient checkpointing the forward is run again there.

        Raises:
            ValueError: a leaf would have no effect: its address is unknown, not a LoRA target, or of a graft that `experts` lacks.
        """
        tree = self.placed(tree)
        try:
            used = self._side.put(tree, experts).union(*(adapter.put(tree) for adapter in self._adapters))
            unknown = tree.keys() - used
            if unknown:
                raise ValueError(f"leaf {min(unknown)!r} has no place in this model with its experts and LoRA targets")
            yield
        finally:
            self._put_nothing()

    @contextmanager
    def using_lanes(self, lanes: Sequence[Lane]) -> Iterator[None]:
        """As `using`, with the leaves of each lane on its own part of a batch."""
        try:
            self.put(FittedLanes.of(lanes, self._side))
            yield
        finally:
            self._put_nothing()

    def _put_nothing(self) -> None:
        for adapter in self._adapters:
            adapter.put({})
        self._side.put({}, [])

    def fitted(self, tree: Mapping[str, Tensor], experts: Experts) -> Fitted:
        """What `using` looks up, for `put`. Of a quantised or offloaded base it holds copies of the source experts.

        Raises:
            ValueError: as `using`.
        """
        with self.using(tree, experts):
            return Fitted(**{name: part._active for name, part in self._named.items()})

    def put(self, fitted: Fitted | FittedRows | FittedLanes) -> None:
        """Predict with these leaves from here on, in a few microseconds; a block of `using` that ends puts the base in their place."""
        for name, part in self._named.items():
            part._active = getattr(fitted, name)

    def side_by_side(self, clients: Sequence[Fitted]) -> Rows:
        """Leaves of several clients, for batches whose rows are each predicted with those of their own client.

        Raises:
            ValueError: as `Rows`.
        """
        return Rows(clients, self.graft_settings, self.lora_settings)

    def watching_gates(self, see: SeeGate) -> AbstractContextManager[None]:
        """Call `see` with the gate values of every graft in use, in every forward inside the block."""
        return self._side.watching_gates(see)

    def frozen_digest(self) -> str:
        """Digest over every pretrained parameter, to show that none has changed."""
        return digest({name: plain(stored(module, name.rpartition(".")[2])).detach() for name, module in self._holders.items()})


def _check_they_run(base: Base, chosen: Sequence[Projection]) -> None:
    """Check that every adapted layer runs in a forward; kernels that read its weights by themselves would leave its adapter without effect.

    Raises:
        ValueError: one does not.
    """
    silent = {projection.path for projection in chosen}
    handles = [base.model.get_submodule(path).register_forward_hook(lambda *_, path=path: silent.discard(path)) for path in tuple(silent)]
    try:
        with torch.no_grad():
            base.model(torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=base.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if silent:
        raise ValueError(
            f"lora.targets: {min(silent)} does not run as a layer of its own here, so an adapter would have no effect; leave it out"
        )


def drawn_adapters(anatomy: Anatomy, lora: LoraSettings, seed: int) -> Tree:
    """The part of `GraftedModel.fresh_adapters` that is drawn, from shapes alone: all but the routers' rows, which are copied.

    Raises:
        ValueError: a LoRA target does not exist.
    """
    pairs = low_rank_shapes(anatomy, lora) | (expert_shapes(anatomy, lora) if "experts" in lora.targets else {})
    return fresh_pairs(pairs, seed)


def adapter_shapes(anatomy: Anatomy, lora: LoraSettings) -> Shapes:
    """Shapes of the leaves of everything in `lora.targets`; needs no weights, so the meta device will do.

    Raises:
        ValueError: a LoRA target does not exist.
    """
    shapes = low_rank_shapes(anatomy, lora)
    shapes |= router_shapes(anatomy) if "router" in lora.targets else {}
    return shapes | (expert_shapes(anatomy, lora) if "experts" in lora.targets else {})
