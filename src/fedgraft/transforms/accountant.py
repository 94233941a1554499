"""What noise is worth: epsilon of the sampled Gaussian mechanism (Mironov et al. 2019), by the accountant of Opacus."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=4096)
def epsilon(*, noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """The epsilon at `delta` after so many steps; infinite without noise, 0 before the first step.

    Args:
        noise_multiplier: standard deviation of the noise, in units of the most that one contributor can change a sum.
        rate: the probability with which each contributor is in a step, independently of the others; 1: always.
        steps: how many.
        delta: the other half of the guarantee.

    Raises:
        ValueError: Opacus is not installed.
    """
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    accountant = _accountant()()
    accountant.history = [(noise_multiplier, rate, steps)]
    with warnings.catch_warnings():  # that the best order is the first or last one tried: the bound holds, and could be tighter
        warnings.simplefilter("ignore")
        return float(max(0.0, accountant.get_epsilon(delta=delta)))


def check_installed() -> None:
    """Refuse what could not be accounted for later.

    Raises:
        ValueError: Opacus is not installed.
    """
    _accountant()


def _accountant() -> Any:
    try:
        with warnings.catch_warnings():  # of its own imports
            warnings.simplefilter("ignore")
            from opacus.accountants import RDPAccountant
    except ImportError:
        raise ValueError("privacy: epsilon is computed by Opacus, which is not installed; pip install 'fedgraft[privacy]'") from None
    return RDPAccountant
