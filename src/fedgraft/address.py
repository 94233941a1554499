"""Leaf addresses: `layers.<l>.<place>...<projection>.<part>`, the stable names under which leaves live, travel and are stored.

Places in use: `attention` (LoRA of the attention projections) and `side.<j>` (the j-th grafted expert of a layer: `expert.<projection>` and
its gate `mix`). Parts: `A`, `B` (LoRA factors, A [rank, in], B [out, rank]), `weight` and `bias` (trained in full).

`<l>` counts the decoder layers of the model, dense ones included.
"""

from __future__ import annotations

from fedgraft.tree import Predicate


def attention(layer: int, projection: str, part: str) -> str:
    """Address of an attention leaf, `projection` being its role: q, k, v or o."""
    return f"layers.{layer}.attention.{projection}.{part}"


def side_expert(layer: int, graft: int, projection: str, part: str) -> str:
    """Address of a leaf of the `graft`-th grafted expert, `projection` being gate, up or down."""
    return f"layers.{layer}.side.{graft}.expert.{projection}.{part}"


def side_mix(layer: int, graft: int, part: str) -> str:
    """Address of the learned gate sigma(g . x + b) of a grafted expert: part `weight` is g [H], `bias` is b []."""
    return f"layers.{layer}.side.{graft}.mix.{part}"


def layer_of(address: str) -> int:
    """The layer number inside an address."""
    return int(address.split(".", 2)[1])


def place_of(address: str) -> str:
    """The place inside an address: `attention`, `side`, ..."""
    return address.split(".", 3)[2]


def within(*places: str) -> Predicate:
    """Predicate: the leaf lives at one of these places."""
    return lambda address: place_of(address) in places


def nothing(address: str) -> bool:
    """Predicate that no leaf satisfies."""
    return False


def everything(address: str) -> bool:
    """Predicate that every leaf satisfies."""
    return True
