"""Centralised: the upper bound on pooled rows."""

from __future__ import annotations

import pytest

from fedgraft.account.take import summary
from fedgraft.data.partition import pooled
from fedgraft.recipe import load_recipe
from fedgraft.tree import equal
from tests.methods.harness import ROWS
from tests.methods.test_identities import train_alone


def test_it_is_plain_training_on_all_rows_together(start, monkeypatch):
    """Three rounds of 3 x 2 steps, bit for bit, by the plain loop over the pooled site's batches."""
    run = start("centralised").go()
    assert run.sites == ["pooled"]
    site = run.session.reach.holdings.open("pooled")
    assert [row.id for row in site.data.train] == [row.id for name in ROWS for row in run.session.reach.holdings.clients[name].train]
    assert len(site.batches(0)) == 6
    assert equal(run.state, train_alone(run, "pooled", run.session.reach.holdings.model.fresh_adapters(0), [], monkeypatch))
    assert {name for question, name, _ in run.down if question == "train"} == {"pooled"}


def test_of_one_client_it_is_that_clients_training(start, monkeypatch):
    """But for the order of the rows, which hangs on the site's name."""
    run = start("centralised", clients=("ada",), federation={"rounds": 1}).go()
    assert len(run.session.reach.holdings.open("pooled").batches(0)) == 2
    assert len(run.session.reach.holdings.open("pooled").data.train) == ROWS["ada"]


def test_every_client_is_evaluated_on_its_own_rows_with_the_same_leaves(start):
    run = start("centralised").go()
    asked = [name for question, name, _ in run.down if question == "evaluate"]
    assert asked == list(ROWS)
    method, server = run.session.method, run.session.server
    for name in ROWS:
        answers = method.answer(method, run.session.reach.holdings.open(name), method.pack(method, server, name))
        assert list(answers) == ["base", "personal"]
        assert equal(answers["personal"].tree, run.state)


def test_the_screen_before_training_says_that_data_leave_the_clients(start):
    assert ("travels", "the clients' training rows, to one site") in summary(start("centralised").session.account)
    assert "training rows" not in dict(summary(start("fedavg").session.account))["travels"]


def test_it_does_the_steps_of_the_clients_sampled(start):
    run = start("centralised", federation={"clients_per_round": 2})
    assert run.session.training.steps == 4


def test_a_pooled_site_has_a_name_of_its_own(start):
    clients = dict(zip(["Pooled", "pooled_", "x"], start("fedavg").session.reach.holdings.clients.values(), strict=True))
    assert list(pooled(clients)) == ["pooled__"]


@pytest.mark.parametrize("setting", [{"dropout": 0.1}, {"deadline": 3}, {"join": 2}])
def test_missing_clients_have_no_meaning(setting):
    with pytest.raises(ValueError, match=r"federation\.\w+: method 'centralised' pools the rows, so no client can be missing; remove it"):
        load_recipe({"method": {"name": "centralised"}, "federation": setting})


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("centralised", "has one site, so that there is nothing to merge"),
        ("local", "shares nothing"),
        ("local_graft", "shares nothing"),
        ("scaffold", "corrects gradients by a mean over the clients, which only a mean of their leaves agrees with"),
    ],
)
def test_a_merge_where_none_fits_is_refused(method, why):
    with pytest.raises(ValueError, match=rf"federation\.merge: 'median' can't be used, since method '{method}' {why}; set it to mean"):
        load_recipe({"method": {"name": method}, "federation": {"merge": {"rule": "median"}}})


def test_an_unknown_key_of_a_merge_names_those_there_are():
    with pytest.raises(
        ValueError, match=r"unknown key 'federation\.merge\.krum\.fault' \(did you mean 'faulty'\?\); there are: rule, faulty"
    ):
        load_recipe({"method": {"name": "fedavg"}, "federation": {"merge": {"rule": "krum", "fault": 1}}})
    with pytest.raises(ValueError, match=r"federation\.merge: .*'mean', 'median', 'trimmed_mean', 'krum', 'multi_krum', 'norm_bounded'"):
        load_recipe({"method": {"name": "fedavg"}, "federation": {"merge": {"rule": "medain"}}})
