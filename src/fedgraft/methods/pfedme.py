"""pFedMe (Dinh et al. 2020, arXiv 2006.08848, Algorithm 1): personal models by Moreau envelopes, towards which the shared one moves."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt

from fedgraft.aggregation.merges import uniform
from fedgraft.methods._personal import answer_second, twice, with_second
from fedgraft.methods.method import Method
from fedgraft.training.personal_rules import own_leaves, towards


def build(pull: PositiveFloat = 15.0, rate: PositiveFloat = 0.005, inner: PositiveInt = 5) -> Method:
    """Per local step theta ~ argmin f + pull / 2 ||theta - w||^2 on a batch, then w -= rate pull (w - theta); w is sent, theta stays.

    theta starts a round at the received w. Distances are taken over A and B apart and AdamW solves the inner problem (our adaptations). The
    server takes the unweighted mean, the paper's beta = 1. A round costs `inner` times the optimiser steps of FedAvg on the same rows.

    Args:
        pull: lambda of the paper.
        rate: eta of the paper; rate x pull, the part of the way to theta that w goes in a step, is at most 1.
        inner: optimiser steps per batch, K of the paper.

    Raises:
        ValueError: w would go beyond theta.
    """
    if rate * pull > 1:
        raise ValueError(f"method.rate: {rate} with a pull of {pull} goes beyond theta; choose at most 1 / method.pull, {1 / pull:.3g}")
    return Method(
        leaves=twice,
        personal=own_leaves,
        local=towards(pull, rate, inner),
        merge=uniform,
        passes=inner,
        fresh=with_second,
        answer=answer_second,
    )
