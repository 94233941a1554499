"""FedAvg with fine-tuning (as in Collins et al. 2021, section 5): FedAvg, then every client trains the final leaves on its own rows."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt

from fedgraft.methods._personal import answer_second, fine_tune, fine_tuned_at_the_end, twice
from fedgraft.methods.method import Method
from fedgraft.training.personal_rules import first_alone, own_leaves


def build(rounds: PositiveInt = 1, lr: PositiveFloat | None = None) -> Method:
    """FedAvg's rounds; then, once and by every client, `rounds` times `training.steps` optimiser steps from the final shared leaves.

    The fine-tuned leaves are the client's own and are never sent. A client whose fine-tuning is lost predicts with the shared leaves.

    Args:
        rounds: rounds' worth of local steps, on the batches that would have come next.
        lr: learning rate of the fine-tuning; empty: `training.lr`, since the rounds' cosine has ended by then.
    """
    return Method(
        leaves=twice,
        personal=own_leaves,
        fresh=lambda method, client: {},
        local=first_alone,
        finalize=fine_tuned_at_the_end(rounds, lr),
        finish=fine_tune,
        answer=answer_second,
    )
