"""Trees: flat maps from leaf address to tensor, and the algebra that methods are written in.

An absent key means "not held". Every function returns new trees and leaves its arguments alone; tensors are shared, never copied, unless
said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Tree: TypeAlias = dict[str, Tensor]
Predicate: TypeAlias = Callable[[str], bool]


def partition(tree: Mapping[str, Tensor], chosen: Predicate) -> tuple[Tree, Tree]:
    """(leaves whose address is `chosen`, all others)."""
    yes = {key: leaf for key, leaf in tree.items() if chosen(key)}
    return yes, {key: leaf for key, leaf in tree.items() if key not in yes}


def combine(*trees: Mapping[str, Tensor]) -> Tree:
    """Union of disjoint trees.

    Raises:
        ValueError: an address occurs in two of them.
    """
    whole: Tree = {}
    for tree in trees:
        twice = whole.keys() & tree.keys()
        if twice:
            raise ValueError(f"leaf {min(twice)!r} occurs in two trees that should be disjoint")
        whole.update(tree)
    return whole


def subtract(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Tree:
    """new - old in float64, for the leaves of `new`.

    Raises:
        ValueError: `old` lacks a leaf of `new` or holds it with another shape.
    """
    check_holds(new, old)
    return {key: leaf.double() - old[key].double() for key, leaf in new.items()}


def check_holds(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
    """`old` holds every leaf of `new`, with the same shape.

    Raises:
        ValueError: it lacks one, or holds it with another shape.
    """
    for key, leaf in new.items():
        if key not in old or old[key].shape != leaf.shape:
            had = tuple(old[key].shape) if key in old else "nothing"
            raise ValueError(f"leaf {key!r}: got shape {tuple(leaf.shape)} where the state holds {had}")


def apply_delta(state: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> Tree:
    """State + delta, summed in float64 and rounded once to the state's dtype; leaves without a delta keep their value."""
    return {key: (leaf.double() + delta[key]).to(leaf.dtype) if key in delta else leaf for key, leaf in state.items()}


def clone(tree: Mapping[str, Tensor]) -> Tree:
    """Detached copy."""
    return {key: leaf.detach().clone() for key, leaf in tree.items()}


def count(tree: Mapping[str, Tensor]) -> int:
    """Number of scalars."""
    return sum(leaf.numel() for leaf in tree.values())


def num_bytes(tree: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors, without any framing."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree.values())


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Same addresses, dtypes, shapes and bits (NaN equals the same NaN)."""
    return digest(left) == digest(right)


def raw_bytes(leaf: Tensor) -> bytes:
    """Little-endian bytes of a tensor of any dtype, bfloat16 included."""
    flat = leaf.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def digest(tree: Mapping[str, Tensor]) -> str:
    """SHA-256 over the sorted (address, dtype, shape, little-endian bytes), as hexadecimal digits."""
    sums = hashlib.sha256()
    for key in sorted(tree):
        leaf = tree[key]
        sums.update(f"{key}|{str(leaf.dtype).removeprefix('torch.')}|{list(leaf.shape)}|".encode())
        sums.update(raw_bytes(leaf))
    return sums.hexdigest()


def digest_of_digests(parts: Iterable[str]) -> str:
    """SHA-256 over several digests, in the order given."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
