"""Server steps: old state and merged delta -> new state.

Moments are further trees of the state, in float64. A leaf that nobody held in a round keeps its value and its moments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from fedgraft.bundle import Bundle
from fedgraft.tree import Tree, apply_delta

ServerStep: TypeAlias = Callable[[Bundle, Tree], Bundle]
"""(state, delta) -> new state; a step that keeps moments keeps them as further trees of the state."""
SecondMoment: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(v, squared change) -> new v."""


def replace(state: Bundle, delta: Tree) -> Bundle:
    """The merged leaves become the state: w += delta, which for FedAvg is w = mean of the clients' w."""
    return Bundle(trees={**state.trees, "shared": apply_delta(state.tree("shared"), delta)}, facts=state.facts)


def momentum(*, beta: float, lr: float, dampened: bool = False) -> ServerStep:
    """Server momentum; `dampened`: m = beta m + (1 - beta) delta after a first m = delta."""

    def step(state: Bundle, delta: Tree) -> Bundle:
        """Momentum (Hsu et al. 2019): m = beta m + delta, w += lr m."""
        state, after = _moved(state, delta, beta, 1 - beta if dampened else 1.0)
        return replace(state, {key: lr * moment for key, moment in after.items()})

    return step


def nesterov(*, beta: float, lr: float) -> ServerStep:
    """Nesterov's momentum, as torch.optim.SGD has it, on the merged change as the negative gradient (DiLoCo, arXiv 2311.08105)."""

    def step(state: Bundle, delta: Tree) -> Bundle:
        """Nesterov's momentum: m = beta m + delta, w += lr (delta + beta m)."""
        state, after = _moved(state, delta, beta, 1.0)
        return replace(state, {key: lr * (delta[key] + beta * moment) for key, moment in after.items()})

    return step


def _moved(state: Bundle, delta: Tree, beta: float, share: float) -> tuple[Bundle, Tree]:
    """(state with its new momentum, the momentum of the leaves in delta): m = beta m + share delta, the first m being delta."""
    before = state.tree("momentum")
    after = {key: beta * before[key] + share * change if key in before else change for key, change in delta.items()}
    return _with_moments(state, momentum=after), after


def adaptive(second: SecondMoment, *, lr: float, beta: float, tau: float, released: bool = False) -> ServerStep:
    """FedOpt with v = second(v, delta^2); as `released` with FLEx, the first m is delta itself and v sees m^2."""

    def step(state: Bundle, delta: Tree) -> Bundle:
        """FedOpt (Reddi et al. 2021, Algorithm 2): m = beta m + (1 - beta) delta, v follows delta^2, w += lr m / (sqrt(v) + tau).

        m starts at 0, v at tau^2, without bias correction.
        """
        means, squares, moves = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        for key, change in delta.items():
            known = state.tree("momentum").get(key, change if released else torch.zeros_like(change))
            mean = beta * known + (1 - beta) * change
            spread = state.tree("second_moment").get(key, change.new_full((), tau**2))
            means[key], squares[key] = mean, second(spread, (mean if released else change).square())
            moves[key] = lr * mean / (squares[key].sqrt() + tau)
        return replace(_with_moments(state, momentum=means, second_moment=squares), moves)

    return step


def accumulated(v: Tensor, square: Tensor) -> Tensor:
    """FedAdagrad: v + delta^2."""
    return v + square


def decayed(beta: float) -> SecondMoment:
    """FedAdam: beta v + (1 - beta) delta^2."""
    return lambda v, square: beta * v + (1 - beta) * square


def signed(beta: float) -> SecondMoment:
    """FedYogi: v - (1 - beta) delta^2 sign(v - delta^2)."""
    return lambda v, square: v - (1 - beta) * square * (v - square).sign()


def _with_moments(state: Bundle, **moments: Tree) -> Bundle:
    kept = {name: {**state.tree(name), **tree} for name, tree in moments.items()}
    return Bundle(trees={**state.trees, **kept}, facts=state.facts)
