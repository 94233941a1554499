"""What is masked and summed: the weighted change of the shared leaves as whole numbers, modulo a power of two, and two counts beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgraft.transforms.secure_aggregation.primitives import stream
from fedgraft.transforms.secure_aggregation.settings import SecAggPlus
from fedgraft.tree import Tree

Words: TypeAlias = NDArray[np.unsignedinteger[Any]]
WORDS: Mapping[int, Any] = {32: np.uint32, 64: np.uint64}
SIGNED: Mapping[int, Any] = {32: np.int32, 64: np.int64}
COUNTS = 2


@dataclass(frozen=True, kw_only=True)
class Vector:
    """One client's numbers, a mask, or a sum of them; all modulo a power of two, so that what is subtracted again leaves no trace."""

    words: Words
    """The leaves, sorted by address, end to end."""
    counts: Words
    """(weight, how many numbers were cut), modulo 2^64."""

    def __add__(self, other: Vector) -> Vector:
        """The sum of both."""
        return Vector(words=self.words + other.words, counts=self.counts + other.counts)

    def __sub__(self, other: Vector) -> Vector:
        """What is left without the other."""
        return Vector(words=self.words - other.words, counts=self.counts - other.counts)


def quantised(change: Tree, weight: int, settings: SecAggPlus, rng: np.random.Generator) -> Vector:
    """A client's change [n] as `weight` times multiples of `settings.step`, rounded at random so that it is right in the mean.

    Args:
        change: finite leaves in float64.
        weight: what the client counts.
        settings: the range and the step.
        rng: decides the rounding.
    """
    flat = flattened(change)
    cut = np.clip(flat, -settings.clipping_range, settings.clipping_range)
    return vector_of(rounded(cut, settings, rng) * weight, weight, int(np.count_nonzero(cut != flat)), settings)


def flattened(change: Tree) -> NDArray[np.float64]:
    """The leaves, sorted by address, end to end as [n]."""
    return np.concatenate([change[key].flatten().cpu().numpy() for key in sorted(change)])


def rounded(flat: NDArray[np.float64], settings: SecAggPlus, rng: np.random.Generator) -> NDArray[np.int64]:
    """Numbers [n] as multiples of `settings.step`, up or down at random."""
    return np.floor(flat / settings.clipping_range * settings.levels + rng.random(len(flat))).astype(np.int64)


def vector_of(steps: NDArray[np.int64], weight: int, cut: int, settings: SecAggPlus) -> Vector:
    """Whole numbers [n] as a vector to be masked, with its two counts."""
    return Vector(words=steps.astype(WORDS[settings.modulus_bits]), counts=np.array([weight, cut], dtype=np.uint64))


def mask(key: bytes, size: int, settings: SecAggPlus) -> Vector:
    """The mask that a key makes, uniform over all vectors of `size` numbers."""
    width = settings.modulus_bits // 8
    whole = np.frombuffer(stream(key, size * width + COUNTS * 8), dtype=np.uint8)
    words = whole[: size * width].view(f"<u{width}").astype(WORDS[settings.modulus_bits])
    return Vector(words=words, counts=whole[size * width :].view("<u8").astype(np.uint64))


def as_leaves(vector: Vector, shapes: Mapping[str, tuple[int, ...]], settings: SecAggPlus) -> Tree:
    """The numbers at the addresses that they belong to, the bits as signed integers."""
    flat = torch.from_numpy(vector.words.view(SIGNED[settings.modulus_bits]).copy())
    sizes = [int(np.prod(shapes[key])) for key in sorted(shapes)]
    parts: list[Tensor] = list(flat.split(sizes))
    return {key: part.reshape(shapes[key]).clone() for key, part in zip(sorted(shapes), parts, strict=True)}


def of_leaves(leaves: Tree, counts: list[int], settings: SecAggPlus) -> Vector:
    """The inverse of `as_leaves`."""
    flat = torch.cat([leaves[key].flatten() for key in sorted(leaves)]).numpy()
    return Vector(words=flat.view(WORDS[settings.modulus_bits]), counts=np.array(counts, dtype=np.uint64))


def mean_change(total: Vector, shapes: Mapping[str, tuple[int, ...]], settings: SecAggPlus) -> Tree:
    """The weighted mean that an unmasked sum says, in float64."""
    return {key: leaf.double() / int(total.counts[0]) * settings.step for key, leaf in as_leaves(total, shapes, settings).items()}
