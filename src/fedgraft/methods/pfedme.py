"""pFedMe (Dinh et al. 2020, arXiv 2006.08848, Algorithm 1): personal models by Moreau envelopes, towards which the shared one moves."""

from __future__ import annotations

from fedgraft.aggregation.merges import uniform
from fedgraft.methods._personal import answer_second, twice, with_second
from fedgraft.methods.method import Method
from fedgraft.training.personal_rules import own_leaves, towards


def build(pull: float = 15.0, rate: float = 0.005, inner: int = 5) -> Method:
    """Per local step theta ~ argmin f + pull / 2 ||theta - w||^2 on a batch, then w -= rate pull (w - theta); w is sent, theta stays.

    theta starts a round at the received w. Distances are taken over A and B apart and AdamW solves the inner problem (our adaptations). The
    server takes the unweighted mean, the paper's beta = 1. A round costs `inner` times the optimiser steps of FedAvg on the same rows.

    Args:
        pull: lambda of the paper, above 0.
        rate: eta of the paper; rate x pull, the part of the way to theta that w goes in a step, is at most 1.
        inner: optimiser steps per batch, K of the paper.

    Raises:
        ValueError: an option out of its range.
    """
    if pull <= 0 or not 0 < rate * pull <= 1 or inner < 1:
        raise ValueError(
            f"method.pull, method.rate, method.inner: {pull}, {rate}, {inner}; "
            "choose a pull above 0, a rate of at most 1 / pull, and at least 1 inner step"
        )
    return Method(
        leaves=twice, personal=own_leaves, merge=uniform, fresh=with_second, local=towards(pull, rate, inner), answer=answer_second
    )
