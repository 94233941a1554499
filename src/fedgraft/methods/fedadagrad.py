"""FedAdagrad (Reddi et al. 2021): FedAvg whose server takes Adagrad's step along the merged change."""

from __future__ import annotations

from pydantic import PositiveFloat

from fedgraft.aggregation.merges import by_examples, uniform
from fedgraft.aggregation.server_steps import accumulated, adaptive
from fedgraft.methods.method import Method
from fedgraft.settings import Decay


def build(server_lr: PositiveFloat = 1e-3, beta1: Decay = 0.0, tau: PositiveFloat = 1e-3, released: bool = False) -> Method:
    """m = beta1 m + (1 - beta1) delta, v = v + delta^2, w += server_lr m / (sqrt(v) + tau).

    Args:
        server_lr: the server's learning rate.
        beta1: share of m that is kept from round to round; none in the experiments of Reddi et al., nor in the code released with FLEx.
        tau: floor of the denominator; v starts at its square.
        released: as in the code released with FLEx: unweighted mean.
    """
    step = adaptive(accumulated, lr=server_lr, beta=beta1, tau=tau, released=released)
    return Method(merge=uniform if released else by_examples, step=step)
