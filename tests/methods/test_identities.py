"""What methods must equal, against an ordinary training loop and means taken by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fedgraft import seeds
from fedgraft.data.batches import Batch
from fedgraft.grafts.graft import GraftedModel
from fedgraft.moe.load import load_base
from fedgraft.tree import combine, equal, partition
from tests.training import plain

LR, LR_MIN = 1e-3, 1e-4


def rate(round_number, rounds):
    """The cosine over rounds."""
    return LR_MIN + (LR - LR_MIN) * (1 + math.cos(math.pi * round_number / (rounds - 1))) / 2


def train_alone(run, client, tree, experts, monkeypatch, rounds=(0, 1, 2), of=3):
    """The plain loop over a client's batches, round after round, on a base of its own."""
    monkeypatch.setattr(plain, "EXPERTS", experts)
    recipe = run.session.recipe
    model = GraftedModel(load_base(recipe.model), recipe.lora, recipe.graft)
    site = run.session.reach.holdings.open(client)
    for number in rounds:
        steps: list[Batch] = [part for parts in site.batches(number) for part in parts]
        seed = seeds.derive(recipe.seed, "fit", number, client)
        tree, _ = plain.train(model, tree, steps, recipe.training, seed=seed, lr=rate(number, of))
    return tree


@pytest.mark.parametrize("method", ["fedavg", "local"])
def test_one_client_is_plain_training_of_the_same_leaves(start, monkeypatch, method):
    """Three rounds, bit for bit: what FedAvg's server holds and what Local's client remembers."""
    run = start(method, clients=("ada",)).go()
    expected = train_alone(run, "ada", run.session.reach.holdings.model.fresh_adapters(0), [], monkeypatch)
    found = {"fedavg": run.state, "local": run.memory("ada").tree("personal")}[method]
    assert len(found) == 12
    assert equal(found, expected)


@pytest.mark.parametrize("graft", [{}, {"train": "full", "form": "preserving", "per_layer": 2, "gate_start": "low"}])
def test_flex_of_one_client_is_plain_training_of_attention_and_graft(start, monkeypatch, graft):
    run = start("flex", clients=("ada",), graft=graft).go()
    experts = run.memory("ada").facts["experts"]
    model = run.session.reach.holdings.model
    first = combine(model.fresh_adapters(0), model.fresh_side(experts, 0))
    attention, side = partition(train_alone(run, "ada", first, experts, monkeypatch), lambda key: ".attention." in key)
    assert equal(run.state, attention)
    assert equal(run.memory("ada").tree("personal"), side)


def test_local_clients_do_not_meet(start, monkeypatch):
    """Each of three equals the plain loop of its own; nothing is on the server and nothing is sent."""
    run = start("local").go()
    for name in ("ada", "bo", "cy"):
        expected = train_alone(run, name, run.session.reach.holdings.model.fresh_adapters(0), [], monkeypatch)
        assert equal(run.memory(name).tree("personal"), expected)
    assert run.state == {}


def test_fedavg_is_the_mean_weighted_by_examples(start, monkeypatch):
    """Two rounds of 7 and 12 rows: (7 a + 12 b) / 19 of plain loops that start from the mean before."""
    run = start("fedavg", clients=("ada", "bo"), federation={"rounds": 2}).go()
    mean = run.session.reach.holdings.model.fresh_adapters(0)
    for number in (0, 1):
        ada, bo = (train_alone(run, name, mean, [], monkeypatch, rounds=[number], of=2) for name in ("ada", "bo"))
        mean = {key: ((7 * ada[key].double() + 12 * bo[key].double()) / 19).float() for key in mean}
    for key, leaf in run.state.items():
        torch.testing.assert_close(leaf, mean[key], rtol=0, atol=1e-6)
        uniform = (ada[key] + bo[key]) / 2
        assert (leaf - uniform).abs().max() > 1e-5  # not the unweighted mean


def test_flex_shares_as_fedavg_and_keeps_each_graft(start, monkeypatch):
    """One round of two clients: attention is the mean of both loops, each graft is its own loop's."""
    run = start("flex", clients=("ada", "bo"), federation={"rounds": 1}, training={"lr_min": LR}).go()
    model = run.session.reach.holdings.model
    trained = {}
    for name in ("ada", "bo"):
        experts = run.memory(name).facts["experts"]
        first = combine(model.fresh_adapters(0), model.fresh_side(experts, 0))
        trained[name] = train_alone(run, name, first, experts, monkeypatch, rounds=[0], of=2)
        assert equal(run.memory(name).tree("personal"), {key: leaf for key, leaf in trained[name].items() if ".side." in key})
        assert equal(run.memory(name).tree("trained"), {key: leaf for key, leaf in trained[name].items() if ".attention." in key})
    for key, leaf in run.state.items():
        mean = (7 * trained["ada"][key].double() + 12 * trained["bo"][key].double()) / 19
        torch.testing.assert_close(leaf.double(), mean, rtol=0, atol=1e-7)


def test_accumulation_and_checkpointing_change_no_run(start):
    """Without dropout, whose draws depend on the batches' shapes."""
    slow = {"lr": 4e-5, "lr_min": 1e-6}
    options = ({}, {"accumulation": 2}, {"checkpointing": True})
    whole, *others = (start("flex", lora={"dropout": 0.0}, training=slow | option).go() for option in options)
    for other in others:
        for key, leaf in whole.state.items():
            torch.testing.assert_close(other.state[key], leaf, rtol=0, atol=1e-6)
