"""FedYogi (Reddi et al. 2021): FedAvg whose server takes Yogi's step, whose v moves by delta^2 at most."""

from __future__ import annotations

from pydantic import PositiveFloat

from fedgraft.aggregation.merges import by_examples, uniform
from fedgraft.aggregation.server_steps import adaptive, signed
from fedgraft.methods.method import Method
from fedgraft.settings import Decay


def build(
    server_lr: PositiveFloat = 1e-3, beta1: Decay = 0.9, beta2: Decay = 0.99, tau: PositiveFloat = 1e-3, released: bool = False
) -> Method:
    """m = beta1 m + (1 - beta1) delta, v -= (1 - beta2) delta^2 sign(v - delta^2), w += server_lr m / (sqrt(v) + tau).

    Args:
        server_lr: the server's learning rate.
        beta1: share of m that is kept from round to round.
        beta2: how little v moves in a round.
        tau: floor of the denominator; v starts at its square.
        released: as in the code released with FLEx: unweighted mean, first m = delta, and v sees m^2.
    """
    step = adaptive(signed(beta2), lr=server_lr, beta=beta1, tau=tau, released=released)
    return Method(merge=uniform if released else by_examples, step=step)
