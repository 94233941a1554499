"""Ditto (Li et al. 2021, arXiv 2012.04221, Algorithm 1): FedAvg, and beside it a personal model that is pulled towards the shared one."""

from __future__ import annotations

from pydantic import NonNegativeFloat

from fedgraft.methods._personal import answer_second, twice, with_second
from fedgraft.methods.method import Method
from fedgraft.training.personal_rules import own_leaves, pulled


def build(pull: NonNegativeFloat = 0.1) -> Method:
    """The shared path is FedAvg's. The personal model v_k, a second set of the adapters, trains on min F_k(v) + pull / 2 ||v - w||^2.

    w are the received shared leaves; both models see the same batches of a round, so a round costs two passes. The distance is taken over
    A and B apart, not over their product (our adaptation to LoRA), and AdamW takes the place of SGD.

    Args:
        pull: lambda of the paper; 0 is local training alone.
    """
    return Method(leaves=twice, personal=own_leaves, fresh=with_second, local=pulled(pull), answer=answer_second, passes=2)
