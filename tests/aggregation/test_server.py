"""Sampling, the learning rate's course, packages."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import strategies as st
from pydantic import ValidationError

from fedgraft.aggregation.server import FederationSettings, Server
from tests.strategies import given

NAMES = ["d", "b", "a", "c", "e"]


def server(round_number=0, seed=0, lr=4e-5, lr_min=1e-6, clients=NAMES, **federation):
    settings = FederationSettings(**federation)
    return Server(clients=clients, seed=seed, federation=settings, lr=lr, lr_min=lr_min, fresh_shared=dict, round=round_number)


@given(st.integers(1, 7), st.integers(0, 50), st.integers(0, 5))
def test_sampling_is_without_replacement_in_order_and_a_function_of_seed_and_round(wanted, round_number, seed):
    found = server(round_number, seed, clients_per_round=wanted).sampled()
    assert len(found) == len(set(found)) == min(wanted, 5)
    assert found == [name for name in NAMES if name in found]
    assert found == server(round_number, seed, clients_per_round=wanted, rounds=7).sampled()


def test_all_take_part_unless_said_otherwise():
    assert server().sampled() == NAMES


def test_every_client_is_drawn_equally_often():
    """2 of 5 in 2,000 rounds: 800 each with a standard deviation of sqrt(2000 * 0.4 * 0.6) = 22; within 5 of them."""
    counts = Counter(name for number in range(2000) for name in server(number, clients_per_round=2).sampled())
    assert all(abs(counts[name] - 800) < 110 for name in NAMES)
    draws = [[tuple(server(number, seed, clients_per_round=2).sampled()) for number in range(50)] for seed in (0, 1)]
    assert draws[0] != draws[1]


def test_cosine_from_lr_to_lr_min_by_hand():
    """Five rounds: the angles 0, 45, 90, 135, 180 degrees."""
    rates = [server(number, lr=3.0, lr_min=1.0, rounds=5).round_lr() for number in range(5)]
    root = math.sqrt(0.5)
    assert rates == pytest.approx([3, 2 + root, 2, 2 - root, 1], rel=1e-15)


@pytest.mark.parametrize("rounds", [2, 3, 100])
def test_ends_of_the_cosine(rounds):
    assert server(0, rounds=rounds).round_lr() == pytest.approx(4e-5, rel=1e-15)
    assert server(rounds - 1, rounds=rounds).round_lr() == 1e-6
    assert server(rounds + 3, rounds=rounds).round_lr() == 1e-6


def test_a_single_round_trains_at_lr_and_equal_ends_are_constant():
    assert server(0, rounds=1).round_lr() == pytest.approx(4e-5, rel=1e-15)
    assert {server(number, lr=1e-3, lr_min=1e-3, rounds=9).round_lr() for number in range(9)} == {1e-3}


def test_a_package_carries_round_and_lr_and_what_is_given():
    leaves = {"a": torch.ones(1)}
    package = server(3, rounds=9).package({"shared": leaves}, mu=0.1)
    assert package.facts == {"round": 3, "lr": server(3, rounds=9).round_lr(), "mu": 0.1}
    assert package.tree("shared") is leaves
    assert server().package().trees == {}


@pytest.mark.parametrize("wrong", [{"rounds": -1}, {"clients_per_round": 0}, {"round": 3}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValidationError):
        FederationSettings(**wrong)
