"""FedAdam (Reddi et al. 2021): FedAvg whose server takes Adam's step along the merged change."""

from __future__ import annotations

from pydantic import PositiveFloat

from fedgraft.aggregation.merges import by_examples, uniform
from fedgraft.aggregation.server_steps import adaptive, decayed
from fedgraft.methods.method import Method
from fedgraft.settings import Decay


def build(
    server_lr: PositiveFloat = 1e-3, beta1: Decay = 0.9, beta2: Decay = 0.99, tau: PositiveFloat = 1e-3, released: bool = False
) -> Method:
    """m = beta1 m + (1 - beta1) delta, v = beta2 v + (1 - beta2) delta^2, w += server_lr m / (sqrt(v) + tau).

    Args:
        server_lr: the server's learning rate.
        beta1: share of m that is kept from round to round.
        beta2: share of v that is kept from round to round.
        tau: floor of the denominator; v starts at its square.
        released: as in the code released with FLEx: unweighted mean, first m = delta, and v sees m^2.
    """
    step = adaptive(decayed(beta2), lr=server_lr, beta=beta1, tau=tau, released=released)
    return Method(merge=uniform if released else by_examples, step=step)
