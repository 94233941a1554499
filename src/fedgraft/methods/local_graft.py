"""Local graft: FLEx's leaves with nothing federated, the control that shows what federation adds."""

from __future__ import annotations

from fedgraft.address import everything
from fedgraft.methods.method import Method


def build() -> Method:
    """Attention LoRA, side experts and gates, all personal."""
    return Method(places=frozenset({"adapters", "side"}), personal=everything)
