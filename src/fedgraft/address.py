"""Leaf addresses: `layers.<l>.<place>...<projection>.<part>`, the stable names under which leaves live, travel and are stored.

Places in use: `attention`, `mixer`, `shared` and `linear` (low-rank pairs on linear layers: attention projections, state-space or linear
attention layers, shared experts, all others), `expert.<e>` (low-rank pairs on a routed expert), `router` (its rows, trained in full)
and `side.<j>` (the j-th grafted expert of a layer: `expert.<projection>` and its gate `mix`). Parts: `A`, `B` (LoRA factors, A [rank, in],
B [out, rank]), `weight` and `bias` (trained in full), and `residual`: a frozen change of a linear layer that is added to its output and
never written into the base, dense [out, in] or as a stacked pair `residual.A` [R, in], `residual.B` [out, R], with any scale folded in.

A client may hold a second leaf beside a leaf: `layers.<l>.own.<the rest>`, as in `layers.3.own.attention.q.A`. A second pair at a
projection is added to the first; with `own.mix` = m among the leaves, the first counts 1 - m and the second m.

`<l>` counts the decoder layers of the model, dense ones included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from fedgraft.tree import Predicate

MIX = "own.mix"
"""Address of the share of the second pairs, [] or, for prediction, one for each row of the batch [B]; the first pairs have the rest."""
Value = TypeVar("Value")


def projection(layer: int, place: str, name: str) -> str:
    """Head of the addresses of a low-rank pair on a linear layer: `place` and `name` as in `moe.projections.Projection`."""
    return f"layers.{layer}.{place}.{name}"


def expert(layer: int, index: int, name: str) -> str:
    """Head of the addresses of a low-rank pair on routed expert `index`, `name` being gate, up or down."""
    return f"layers.{layer}.expert.{index}.{name}"


def router(layer: int) -> str:
    """Address of the router's rows [E, H], trained in full."""
    return f"layers.{layer}.router.weight"


def side_expert(layer: int, graft: int, name: str) -> str:
    """Head of the addresses of the `graft`-th grafted expert's leaves, `name` being gate, up or down."""
    return f"layers.{layer}.side.{graft}.expert.{name}"


def side_mix(layer: int, graft: int, part: str) -> str:
    """Address of the learned gate sigma(g . x + b) of a grafted expert: part `weight` is g [H], `bias` is b []."""
    return f"layers.{layer}.side.{graft}.mix.{part}"


def own(address: str) -> str:
    """Address of the second leaf beside the one at `address`."""
    _, layer, rest = address.split(".", 2)
    return f"layers.{layer}.own.{rest}"


def as_own(tree: Mapping[str, Value]) -> dict[str, Value]:
    """The same leaves at the addresses of second leaves."""
    return {own(key): leaf for key, leaf in tree.items()}


def as_first(tree: Mapping[str, Value]) -> dict[str, Value]:
    """The inverse of `as_own`."""
    return {key.replace(".own.", ".", 1): leaf for key, leaf in tree.items()}


def is_residual(address: str) -> bool:
    """Predicate: a frozen change of a linear layer, which clients use and never train or send."""
    return address.endswith((".residual", ".residual.A", ".residual.B"))


def layer_of(address: str) -> int:
    """The layer number inside an address."""
    return int(address.split(".", 2)[1])


def place_of(address: str) -> str:
    """The place inside an address: `attention`, `side`, `own`, ..."""
    first, *rest = address.split(".", 3)
    return rest[1] if first == "layers" else first


def side_number(address: str) -> int:
    """Which graft of its layer a leaf of the place `side` belongs to."""
    return int(address.split(".", 4)[3])


def within(*places: str) -> Predicate:
    """Predicate: the leaf lives at one of these places."""
    return lambda address: place_of(address) in places


def nothing(address: str) -> bool:
    """Predicate that no leaf satisfies."""
    return False


def everything(address: str) -> bool:
    """Predicate that every leaf satisfies."""
    return True
