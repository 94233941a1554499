"""Server steps: old state and merged delta -> new state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from fedgraft.bundle import Bundle
from fedgraft.tree import Tree, apply_delta

ServerStep: TypeAlias = Callable[[Bundle, Tree], Bundle]
"""(state, delta) -> new state; a step that keeps moments keeps them as further trees of the state."""


def replace(state: Bundle, delta: Tree) -> Bundle:
    """The merged leaves become the state: w += delta, which for FedAvg is w = mean of the clients' w."""
    return Bundle(trees={**state.trees, "shared": apply_delta(state.tree("shared"), delta)}, facts=state.facts)
