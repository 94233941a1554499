"""FedPer (Arivazhagan et al. 2019, arXiv 1912.00818, Algorithms 1 and 2): the last layers are personal, the ones below shared."""

from __future__ import annotations

from fedgraft.methods._personal import last_layers_personal
from fedgraft.methods.method import Method
from fedgraft.training.local_rules import plain


def build(layers: int = 1) -> Method:
    """All leaves train together; the adapters of the last layers never leave the client.

    The paper's personalisation layers are the last ones of the network; with a frozen base those are the adapters of the last decoder
    layers (our adaptation).

    Args:
        layers: how many of the adapted decoder layers are personal, K_P of the paper; at least one stays shared.
    """
    return Method(settle=last_layers_personal(layers, lambda personal: plain))
