"""Differential privacy of clients under masks: a change is clipped, made whole numbers, noised in whole numbers, and only then masked.

Rounding comes before the noise, since rounding each client's noised change would be no function of their noised sum. So a client's
whole numbers are no longer than the clip however they were rounded, its share of the noise is discrete Gaussian, and the sum of `least`
shares or more is as good as Gaussian noise of the same variance: the Rényi divergence of order a is at most a clip^2 / (2 variance) + t d
for d numbers of n clients, with t below 10 n exp(-pi^2 variance of a share) (Kairouz, Liu and Steinke 2021, Proposition 14), which is
nothing from `FINEST` on. The remainder modulo a power of two, the masks and all further computation come after the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft.transforms.client_privacy import share_within
from fedgraft.transforms.noise import Noise
from fedgraft.transforms.privacy import ClientPrivacy, ExamplePrivacy, NoPrivacy

FINEST = 4
"""Least deviation of a share of the noise in steps: exp(-pi^2 16) is 1e-69."""
ROUNDING = 0.1
"""Most that rounding may take of the clip."""
TAIL = 12
"""Deviations of the noise that a sum has room for: a number is beyond them once in 10^31. Privacy does not depend on it."""


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one client may contribute to a sum."""

    clip: float
    """Largest Euclidean norm of its whole numbers times their step."""
    noise_multiplier: float = 0.0
    """Deviation of the noise of `least` shares in units of the clip; 0: clients add none."""
    least: int = 0
    """Clients whose shares make the whole noise; 0: the coordinator adds it."""
    noise_of: Callable[[str], Noise] | None = None
    """A client's own noise; None at the coordinator."""

    @staticmethod
    def of(privacy: NoPrivacy | ClientPrivacy | ExamplePrivacy, noise_of: Callable[[str], Noise] | None = None) -> Contribution | None:
        """What a run under secure aggregation asks for; None where clients are not clipped."""
        if not isinstance(privacy, ClientPrivacy):
            return None
        assert privacy.clip is not None, "refused with secure aggregation"
        multiplier = privacy.noise_multiplier if privacy.shares else 0.0
        return Contribution(clip=privacy.clip, noise_multiplier=multiplier, least=privacy.shares, noise_of=noise_of)

    def variance(self, step: float) -> int:
        """Of a share of the noise, in steps squared; never less than `least` shares need."""
        return math.ceil((self.noise_multiplier * self.clip / step) ** 2 / self.least) if self.least else 0

    def largest(self, step: float, clients: int) -> int:
        """Steps that a number of the sum of so many clients stays within."""
        return clients * math.ceil(self.clip / step) + TAIL * (math.isqrt(clients * self.variance(step)) + 1)

    def check(self, step: float, size: int) -> None:
        """Refuse steps in which the clip of so many numbers, or a share of the noise, cannot be told well enough.

        Raises:
            ValueError: they are too coarse; says how fine they must be.
        """
        finest = ROUNDING * self.clip / _longest_error(size)
        if self.least and self.noise_multiplier > 0:
            finest = min(finest, self.noise_multiplier * self.clip / math.sqrt(self.least) / FINEST)
        if step > finest:
            raise ValueError(
                f"secure_aggregation.quantisation_bits: a step of {step:.2g} is too coarse for privacy.clip {self.clip:g}, its noise and "
                f"{size} numbers, which need {finest:.2g}; raise it, or lower secure_aggregation.clipping_range"
            )

    def shortened(self, flat: NDArray[np.float64], step: float) -> NDArray[np.float64]:
        """A change [n], scaled down so that however it is rounded to steps its norm is at most the clip."""
        longest = self.clip - step * _longest_error(len(flat))
        return flat * share_within(float(np.linalg.norm(flat)), longest)

    def noised(self, steps: NDArray[np.int64], step: float, client: str, round_number: int) -> NDArray[np.int64]:
        """Whole numbers [n] with the client's share of the noise; the same again for the same numbers."""
        variance = self.variance(step)
        if not variance:
            return steps
        assert self.noise_of is not None
        own = self.noise_of(client).about({"steps": torch.from_numpy(steps)})
        return steps + own.whole(len(steps), variance, "share", round_number)


def _longest_error(size: int) -> float:
    """Norm, in steps, that rounding so many numbers by less than a step each stays below, with one step to spare for float64."""
    return math.sqrt(size) + 1
