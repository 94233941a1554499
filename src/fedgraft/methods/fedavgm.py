"""FedAvgM (Hsu et al. 2019): FedAvg whose server keeps a momentum over the rounds."""

from __future__ import annotations

from pydantic import PositiveFloat

from fedgraft.aggregation.server_steps import momentum
from fedgraft.methods.method import Method
from fedgraft.settings import Decay


def build(beta: Decay = 0.9, server_lr: PositiveFloat = 1.0, dampened: bool = False) -> Method:
    """The step alone differs from FedAvg: m = beta m + delta, w += server_lr m.

    Args:
        beta: share of the momentum that is kept from round to round.
        server_lr: the server's learning rate.
        dampened: m = beta m + (1 - beta) delta, its first value being delta, as in the code released with FLEx.
    """
    return Method(step=momentum(beta=beta, lr=server_lr, dampened=dampened))
