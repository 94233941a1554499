"""Noise that only the holder of a secret can take away again, and the files that hold such secrets.

Numbers come from SHAKE-256 over the secret and the name of the stream: equal on every machine, so that a run resumes bit for bit, and not
to be worked out from other numbers of the same secret, as those of torch's and NumPy's generators can be. They are rounded to float64, by
which a guarantee over real numbers can lose a little (Mironov 2012); nothing here mends that.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgraft import files, seeds
from fedgraft.tree import digest

SECRET = "noise.key"
"""The file of a secret: the coordinator's in the run folder, a client's in the folder of its memory."""
BITS = 52
"""So many bits and a half are exact in float64, and never 0 or 1."""


@dataclass(frozen=True)
class Noise:
    """Streams of random numbers by name."""

    secret: bytes = field(repr=False)
    seeded: bool = False
    """Of a recipe's seed, so that it hides nothing; then runs that differ by rounding should have the same noise."""

    def uniform(self, count: int, *stream: str | int) -> NDArray[np.float64]:
        """Numbers between 0 and 1, both left out, as [count]."""
        words = np.frombuffer(self._bytes(8 * count, *stream), dtype="<u8") >> np.uint64(64 - BITS)
        return np.asarray((words + 0.5) / 2.0**BITS)

    def normal(self, shape: tuple[int, ...], *stream: str | int) -> Tensor:
        """Standard normal numbers in float64, by the inverse of their distribution function."""
        from scipy.special import ndtri

        return torch.from_numpy(ndtri(self.uniform(math.prod(shape), *stream))).reshape(shape)

    def seed(self, *stream: str | int) -> int:
        """A seed of 63 bits for streams that need not stand up to an attack by themselves."""
        return int.from_bytes(self._bytes(8, *stream), "big") >> 1

    def below(self, *stream: str | int) -> Noise:
        """Streams of their own."""
        return replace(self, secret=self._bytes(32, *stream))

    def about(self, *trees: Mapping[str, Tensor]) -> Noise:
        """Streams that belong to what the noise is added to: the same for the same bits, others for any other, unless `seeded`.

        So what is done again gets the same noise again, and no two contents share noise, which a difference of both would be free of.
        """
        return self if self.seeded else self.below("about", *map(digest, trees))

    def _bytes(self, count: int, *stream: str | int) -> bytes:
        name = "\x1f".join(map(str, stream)).encode()
        return hashlib.shake_256(len(self.secret).to_bytes(8, "big") + self.secret + name).digest(count)


def seeded(seed: int, *stream: str | int) -> Noise:
    """Noise of a simulation: whoever knows the recipe can take it away."""
    return Noise(seeds.derive(seed, "privacy", *stream).to_bytes(8, "big"), seeded=True)


def drawn() -> Noise:
    """A new secret, from the operating system."""
    return Noise(secrets.token_bytes(32))


def kept(folder: Path) -> Noise | None:
    """The secret in a folder; None where there is none."""
    path = folder / SECRET
    return Noise(bytes.fromhex(files.read_text(path).strip())) if path.is_file() else None


def keep(folder: Path, noise: Noise) -> None:
    """Write a secret that only its owner can read."""
    files.write_bytes(folder / SECRET, noise.secret.hex().encode() + b"\n", private=True)
