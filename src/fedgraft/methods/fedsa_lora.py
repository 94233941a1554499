"""FedSA-LoRA (Guo et al. 2025, arXiv 2410.01463, section 3): the A factors are shared, the B factors stay on the client."""

from __future__ import annotations

from fedgraft.methods.method import Method


def build() -> Method:
    """Both factors train together; the server averages A alone, so up and down half of the pairs' bytes travel.

    The A factors of all clients are averaged weighted by examples, as elsewhere in this frame.
    """
    return Method(personal=lambda key: key.endswith(".B"))
