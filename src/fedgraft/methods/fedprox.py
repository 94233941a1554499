"""FedProx (Li et al. 2020): FedAvg whose clients are held near the leaves they received."""

from __future__ import annotations

from pydantic import NonNegativeFloat

from fedgraft.methods.method import Method
from fedgraft.training.local_rules import proximal


def build(mu: NonNegativeFloat = 0.01) -> Method:
    """Local training alone differs from FedAvg.

    Args:
        mu: weight of the term mu/2 ||w - w_g||^2; 0 is FedAvg bit for bit.
    """
    return Method(local=proximal(mu))
