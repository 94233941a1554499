"""Named random streams: every stream is a function of (seed, purpose, round, client, ...), never of order or time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, purpose: str, *parts: str | int) -> int:
    """A 63-bit seed for one stream."""
    text = "\x1f".join([str(seed), purpose, *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def uniform(seed: int, purpose: str, *parts: str | int) -> float:
    """One number in [0, 1) that is all of its stream, drawn many times faster than a generator is made."""
    return (derive(seed, purpose, *parts) >> 10) / 2**53  # as many bits as a float keeps, so that none is rounded up to 1


def numpy_rng(seed: int, purpose: str, *parts: str | int) -> np.random.Generator:
    """NumPy generator of one stream."""
    return np.random.default_rng(derive(seed, purpose, *parts))


def torch_rng(seed: int, purpose: str, *parts: str | int) -> torch.Generator:
    """Torch CPU generator of one stream."""
    return torch.Generator().manual_seed(derive(seed, purpose, *parts))


@contextmanager
def torch_default(value: int) -> Iterator[None]:
    """Torch's default generators (which dropout draws from) seeded inside, put back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(value)
        yield
