"""FedRep (Collins et al. 2021, arXiv 2102.07078, Algorithm 1): a personal head, trained first, on a shared representation."""

from __future__ import annotations

from fedgraft.methods._personal import last_layers_personal
from fedgraft.methods.method import Method
from fedgraft.training.personal_rules import in_turn


def build(layers: int = 1) -> Method:
    """As FedPer, but in turn: the personal layers with the received shared ones fixed, then the shared ones with the new personal ones.

    The head is the adapters of the last decoder layers (our adaptation). Each of the two passes runs over the round's batches once, where
    the paper gives the head more steps than the representation.

    Args:
        layers: how many of the adapted decoder layers are personal; at least one stays shared.
    """
    return Method(settle=last_layers_personal(layers, in_turn), passes=2)
