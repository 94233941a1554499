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
WORD = 64
AT_ONCE = 1 << 18
"""Candidates for whole numbers that are drawn together, so that those of a large model fit into memory. Half of them or so are kept."""
ROWS = np.array([int(math.exp(-length) * 2.0**WORD) for length in range(WORD * 2 // 3, 0, -1)], dtype=np.uint64)
"""A random word is below the last one with probability 1 / e, below the one before with 1 / e^2, and so on."""


@dataclass(frozen=True)
class Noise:
    """Streams of random numbers by name."""

    secret: bytes = field(repr=False)
    seeded: bool = False
    """Of a recipe's seed, so that it hides nothing; then runs that differ by rounding should have the same noise."""

    def uniform(self, count: int, *stream: str | int) -> NDArray[np.float64]:
        """Numbers between 0 and 1, both left out, as [count]."""
        words = self._words(count, *stream) >> np.uint64(WORD - BITS)
        return np.asarray((words + 0.5) / 2.0**BITS)

    def normal(self, shape: tuple[int, ...], *stream: str | int) -> Tensor:
        """Standard normal numbers in float64, by the inverse of their distribution function."""
        from scipy.special import ndtri

        return torch.from_numpy(ndtri(self.uniform(math.prod(shape), *stream))).reshape(shape)

    def whole(self, count: int, variance: int, *stream: str | int) -> NDArray[np.int64]:
        """Whole numbers of the discrete Gaussian distribution, as [count]: k is as probable as exp(-k^2 / (2 variance)) says.

        Canonne, Kamath and Steinke 2020, Algorithm 3. Of what it decides by, only the probabilities with which a candidate stays are
        rounded: to a part in 2^50 or to 2^-63, whichever is coarser. So every whole number can come, and the same ones wherever noise is
        added to a whole number, which is not so with rounded floats.
        """
        parts, missing, attempt = [np.empty(0, np.int64)], count, 0
        while missing > 0:
            words = self._words(4 * min(5 * missing // 2 + 16, AT_ONCE), *stream, attempt).reshape(4, -1)
            parts.append(_kept(words, variance)[:missing])
            missing, attempt = missing - len(parts[-1]), attempt + 1
        return np.concatenate(parts)

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

    def _words(self, count: int, *stream: str | int) -> NDArray[np.uint64]:
        return np.frombuffer(self._bytes(WORD // 8 * count, *stream), dtype="<u8").astype(np.uint64)

    def _bytes(self, count: int, *stream: str | int) -> bytes:
        name = "\x1f".join(map(str, stream)).encode()
        return hashlib.shake_256(len(self.secret).to_bytes(8, "big") + self.secret + name).digest(count)


def _kept(words: NDArray[np.uint64], variance: int) -> NDArray[np.int64]:
    """Of candidates, one for each column of four random words, those that are discrete Gaussian numbers.

    A candidate is a discrete Laplace number of scale t = floor(deviation) + 1: u below t, of which exp(-u / t) stay, and t for every
    success in a row with probability 1 / e. Of those, exp(-(|candidate| - variance / t)^2 / (2 variance)) stay.
    """
    scale = math.isqrt(variance) + 1
    rest, runs, laplace, gaussian = words
    below = rest % np.uint64(scale)
    fair = rest <= np.uint64((1 << WORD) - (1 << WORD) % scale - 1)  # else some remainders are more frequent than others
    size = below.astype(np.int64) + scale * (len(ROWS) - np.searchsorted(ROWS, runs, side="right"))
    negative = (laplace & np.uint64(1)).astype(bool)  # a bit that `_stays` does not look at
    stays = fair & _stays(laplace, np.exp(-(below / scale))) & ~(negative & (size == 0))
    stays &= _stays(gaussian, np.exp(-((size - variance / scale) ** 2) / (2 * variance)))
    return np.asarray(np.where(negative, -size, size)[stays], dtype=np.int64)


def _stays(words: NDArray[np.uint64], probability: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether the first 63 bits, as a fraction, are below a probability."""
    return np.asarray(words >> np.uint64(1) < (probability * 2.0 ** (WORD - 1)).astype(np.uint64))


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
