"""The coordinator's side of a run with 100,000 clients, who are no more than names: they answer at once, with tiny leaves."""

from __future__ import annotations

import gc
import json
import math
import tracemalloc
from collections import Counter

import pytest
import torch

from fedgraft.aggregation.server import Reply
from fedgraft.bundle import Bundle
from fedgraft.engine.card import Card
from fedgraft.engine.engine import Traffic
from fedgraft.moe.skeleton import skeleton
from fedgraft.recipe import check_values
from fedgraft.report.progress import Quiet
from fedgraft.session import Session
from fedgraft.transforms.guarantee import Guarantee

CLIENTS, ASKED, ROUNDS = 100_000, 1_000, 20
LEAF, SIZE = "layers.0.attention.q.A", 4
NAMES = [f"client-{number:06}" for number in range(CLIENTS)]


class Names:
    """A reach and an engine in one: every client moves each number by 1."""

    def __init__(self, recipe, folder, run, listener):
        self.recipe, self.clients, self.sites, self.unseen = recipe, NAMES, NAMES, []
        self.asked = self.committed = 0
        self.traffic, self.store, self.left = Traffic(), None, frozenset()
        self.questions = []

    def anatomy(self):
        return skeleton(self.recipe.model)

    def engine(self):
        return self

    def cards(self):
        return [
            Card(name=name, rows={"train": 1, "validation": 1, "test": 1}, categories={}, data_digest="", base_digest="") for name in NAMES
        ]

    def start(self):
        return {}

    def fresh_adapters(self):
        return {LEAF: torch.zeros(SIZE)}

    def ask(self, question, packages):
        self.asked += 1
        self.questions.append((question, list(packages)))
        for client, package in packages.items():
            leaves = {key: leaf + 1 for key, leaf in package.tree("shared").items()}
            facts = {"examples": 1, "loss": 2.0, "tokens": 3, "seconds": 0.5, "truncated": 0}
            yield Reply(client=client, bundle=Bundle(trees={"shared": leaves}, facts=facts))

    def close(self):
        pass


@pytest.fixture
def begun(world, tmp_path):
    """`begun(federation, **sections)`: a session whose state is open."""

    def make(federation, **sections):
        recipe = world.recipe(
            method={"name": "fedavg"}, federation={"rounds": ROUNDS, "clients_per_round": ASKED, **federation}, **sections
        )
        session = Session(check_values(recipe, "recipe"), tmp_path, Quiet(), connect=Names)
        session._open()
        return session

    return make


def rounds(session, tmp_path, count=ROUNDS):
    """The lines of so many rounds."""
    for _ in range(count):
        session._round()
    return [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_each_is_asked_as_often_as_the_scheme_says(begun, tmp_path, sampling):
    """Within five standard deviations of the binomial: the size of a round, how many are asked how often, and both halves of the names."""
    session = begun({"sampling": sampling})
    lines = rounds(session, tmp_path)
    asked = [names for question, names in session.engine.questions if question == "train"]
    rate, sizes = ASKED / CLIENTS, list(map(len, asked))
    assert [list(line["clients"]) for line in lines] == asked
    if sampling == "fixed":
        assert set(sizes) == {ASKED}
    else:
        assert len(set(sizes)) > 1
        assert all(abs(size - ASKED) < 5 * math.sqrt(ASKED * (1 - rate)) for size in sizes)
    often = Counter(Counter(name for names in asked for name in names).values())
    for times in range(1, 4):
        share = math.comb(ROUNDS, times) * rate**times * (1 - rate) ** (ROUNDS - times)
        assert abs(often[times] - CLIENTS * share) < 5 * math.sqrt(CLIENTS * share) + 1
    low = sum(name < NAMES[CLIENTS // 2] for names in asked for name in names)
    assert abs(low - sum(sizes) / 2) < 5 * math.sqrt(sum(sizes)) / 2
    assert torch.equal(session.server.state.tree("shared")[LEAF], torch.full((SIZE,), float(ROUNDS)))


def test_a_round_costs_what_it_asks(begun, tmp_path):
    """Late ones and those out of reach are told of, nobody else: some 100 bytes of the record for each; and nothing is piled up."""
    session = begun({"dropout": 0.1, "deadline": 3.5, "step_seconds": [1.0, 2.0]})
    held = []
    tracemalloc.start()
    for _ in range(4):
        session._round()
        session.engine.questions.clear()
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    for line in rounds(session, tmp_path, 0):
        told = line["simulated"]
        assert len(line["clients"]) + len(told["late"]) + len(told["dropped"]) == ASKED
        assert told["late"]
        assert told["dropped"]
        assert len(json.dumps(line)) < 200 * ASKED
    assert held[3] < held[1] + 50 * ASKED


def test_what_is_spent_is_that_of_the_rate(begun, tmp_path, monkeypatch):
    """Asked of the accountant once a round, not for all clients at every reply."""
    monkeypatch.setattr("fedgraft.transforms.guarantee.epsilon", lambda rate, steps, **_: calls.append((rate, steps)) or rate * steps)
    calls = []
    session = begun(
        {"sampling": "poisson"}, privacy={"name": "client", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-6, "secret": False}
    )
    monkeypatch.delitem(vars(session.guarantee), "rates")  # 100,000 of them, which no reply may look through again
    monkeypatch.setattr(Guarantee, "rates", property(lambda _: pytest.fail("looked through")))
    lines = rounds(session, tmp_path, 3)
    assert [line["privacy"]["epsilon"] for line in lines] == pytest.approx([0.01, 0.02, 0.03])
    assert {rate for rate, _ in calls} == {ASKED / CLIENTS}
