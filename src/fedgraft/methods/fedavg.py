"""FedAvg (McMahan et al. 2017) on the attention LoRA: everything is shared, the server takes the mean weighted by examples."""

from __future__ import annotations

from fedgraft.methods.method import Method


def build() -> Method:
    """The defaults of the frame."""
    return Method()
