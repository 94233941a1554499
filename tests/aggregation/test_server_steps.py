"""Server steps against scalar arithmetic written out from the papers and from the released code."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import strategies as st

from fedgraft.aggregation.server_steps import accumulated, adaptive, decayed, momentum, nesterov, replace, signed
from fedgraft.bundle import Bundle
from fedgraft.tree import equal
from tests.strategies import ADDRESSES, given

KEY, OTHER = ADDRESSES[0], ADDRESSES[1]
CHANGES = st.lists(st.floats(-2, 2).filter(lambda value: abs(value) > 1e-3), min_size=1, max_size=6)
LR, BETA, SECOND, TAU = 0.1, 0.9, 0.99, 1e-3
SECONDS = {"adagrad": accumulated, "adam": decayed(SECOND), "yogi": signed(SECOND)}


def state(value=0.5, **trees):
    return Bundle(trees={"shared": {KEY: torch.tensor([value]), OTHER: torch.tensor([7.0])}, **trees}, facts={"n": 1})


def after(step, changes):
    """The value of a leaf that starts at 0.5 after these changes, one a round, through the codec; the other leaf is held by nobody."""
    now = state()
    for change in changes:
        now = Bundle.decode(step(now, {KEY: torch.tensor([change], dtype=torch.float64)}).encode())
    assert now.facts == {"n": 1}
    assert now.tree("shared")[OTHER].item() == 7.0
    assert all(OTHER not in tree for name, tree in now.trees.items() if name != "shared")
    assert {leaf.dtype for name, tree in now.trees.items() for leaf in tree.values() if name != "shared"} <= {torch.float64}
    return now.tree("shared")[KEY].item()


@given(CHANGES, st.sampled_from([0.0, BETA]))
def test_nesterovs_step_is_torchs_on_the_change_as_the_negative_gradient(changes, beta):
    leaf = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([leaf], lr=LR, momentum=beta, nesterov=beta > 0)
    for change in changes:
        leaf.grad = torch.tensor([-change], dtype=torch.float64)
        optimizer.step()
    assert after(nesterov(beta=beta, lr=LR), changes) == pytest.approx(leaf.item(), rel=1e-5, abs=1e-6)


@given(CHANGES)
def test_momentum_is_hsus(changes):
    m, w = 0.0, 0.5
    for change in changes:
        m = BETA * m + change
        w += LR * m
    assert after(momentum(beta=BETA, lr=LR), changes) == pytest.approx(w, rel=1e-5, abs=1e-6)


@given(CHANGES)
def test_dampened_momentum_is_that_of_the_released_code(changes):
    m, w = None, 0.5
    for change in changes:
        m = change if m is None else BETA * m + (1 - BETA) * change
        w += m
    assert after(momentum(beta=BETA, lr=1.0, dampened=True), changes) == pytest.approx(w, rel=1e-5, abs=1e-6)


def second(name, v, square):
    if name == "adagrad":
        return v + square
    if name == "adam":
        return SECOND * v + (1 - SECOND) * square
    return v - (1 - SECOND) * square * math.copysign(1, v - square)


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("released", [False, True])
@given(changes=CHANGES)
def test_adaptive_steps_are_reddis_or_those_of_the_released_code(name, released, changes):
    m, v, w = None if released else 0.0, TAU**2, 0.5
    for change in changes:
        m = change if m is None else BETA * m + (1 - BETA) * change
        v = second(name, v, (m if released else change) ** 2)
        w += LR * m / (math.sqrt(v) + TAU)
    step = adaptive(SECONDS[name], lr=LR, beta=BETA, tau=TAU, released=released)
    assert after(step, changes) == pytest.approx(w, rel=1e-5, abs=1e-6)


def test_fedadams_first_step_by_hand():
    """delta 0.1: m = 0.01, v = 0.99e-6 + 0.01 * 0.01 = 1.0099e-4, w = 0.5 + 1e-3 * 0.01 / (0.010049 + 0.001)."""
    found = after(adaptive(decayed(0.99), lr=1e-3, beta=0.9, tau=1e-3), [0.1])
    assert found == pytest.approx(0.5 + 1e-3 * 0.01 / (1.0099e-4**0.5 + 1e-3), abs=1e-7)
    assert found == pytest.approx(0.5009050, abs=1e-6)


STEPS = {"momentum": momentum(beta=BETA, lr=LR)} | {name: adaptive(rule, lr=LR, beta=BETA, tau=TAU) for name, rule in SECONDS.items()}


@pytest.mark.parametrize("name", STEPS)
def test_a_leaf_that_nobody_held_keeps_value_and_moments(name):
    step = STEPS[name]
    both = step(state(), {key: torch.tensor([0.3], dtype=torch.float64) for key in (KEY, OTHER)})
    later = step(both, {KEY: torch.tensor([0.2], dtype=torch.float64)})
    for tree, leaves in both.trees.items():
        assert torch.equal(later.trees[tree][OTHER], leaves[OTHER])
        assert not torch.equal(later.trees[tree][KEY], leaves[KEY])
    unheard = step(both, {})
    assert unheard.trees.keys() == both.trees.keys()
    assert all(equal(unheard.trees[tree], both.trees[tree]) for tree in both.trees)


def test_momentum_without_memory_is_fedavg():
    """beta = 0 and a server learning rate of 1, bit for bit."""
    delta = {KEY: torch.tensor([0.3], dtype=torch.float64)}
    step = momentum(beta=0.0, lr=1.0)
    assert equal(step(step(state(), delta), delta).tree("shared"), replace(replace(state(), delta), delta).tree("shared"))
