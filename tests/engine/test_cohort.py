"""Runs whose clients train in cohorts: the same results to rounding, the same protocol."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fedgraft.recipe import load_recipe
from fedgraft.report.progress import Quiet
from fedgraft.runner import resume
from fedgraft.runner import run as run_recipe
from fedgraft.session import Session, Stopped
from fedgraft.training import fit
from tests.contract.test_methods import StopAt

CLIENTS = ["ada", "bo", "cy"]


def engine(cohort, **further):
    return {"name": "inprocess", "cohort": cohort, **further}


def lines(run):
    """The record of its rounds."""
    return [json.loads(line) for line in (run.session.folder / "rounds.jsonl").read_text().splitlines()]


class Heard(Quiet):
    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


@pytest.mark.parametrize("method", ["fedavg", "flex", "scaffold", "ditto", "fedavg_ft"])
def test_a_run_in_cohorts_is_that_of_one_after_another(start, method):
    """3 clients in cohorts of 2 and 1, dropout 0.1; a tenth of a step of lr 1e-3 after 6 steps of AdamW, in single precision."""
    steps = {"training": {"least_steps": 1}, "federation": {"rounds": 2}}
    alone, jointly = (start(method, engine=engine(cohort), **steps).go() for cohort in (1, 2))
    for key, leaf in alone.state.items():
        torch.testing.assert_close(jointly.state[key], leaf, rtol=0, atol=1e-4)
    assert [(question, client) for question, client, _ in jointly.up] == [(question, client) for question, client, _ in alone.up]
    for one, other in zip(lines(alone), lines(jointly), strict=True):
        assert one["tokens"] == other["tokens"]
        assert list(one["clients"]) == list(other["clients"])
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
    versions = [[run.session.engine.store.versions(client) for client in CLIENTS] for run in (alone, jointly)]
    assert versions[0] == versions[1]


def test_a_cohort_of_one_is_todays_path_bit_for_bit(start):
    assert start("flex", engine=engine(1)).go().digest == start("flex").go().digest


@pytest.mark.parametrize("step", [2, 4])
def test_a_stopped_run_resumes_to_the_same_bits(place, tmp_path, step):
    """Inside a cohort's round, when memories of it are written and its state is not."""
    recipe = place.recipe("flex", engine=engine(2))
    run_recipe(recipe, out=tmp_path / "whole", progress=Quiet())
    with pytest.raises(Stopped):
        run_recipe(recipe, out=tmp_path / "stopped", progress=StopAt("training", step))
    resume(tmp_path / "stopped", progress=Quiet())
    assert (tmp_path / "stopped" / "digest.txt").read_text() == (tmp_path / "whole" / "digest.txt").read_text()


def test_a_client_that_is_not_finite_is_a_lost_reply(start, monkeypatch):
    """Bo's first round fails: its memory stays, its reply is absent, the others are as in a run whose reply from Bo is lost."""
    own = fit.fit

    def fails(model, trained, steps, settings, **options):
        if next(calls) == 1:
            options["penalty"] = lambda leaves: sum(leaf.sum() for leaf in leaves.values()) * math.nan
        return own(model, trained, steps, settings, **options)

    calls = iter(range(100))
    monkeypatch.setattr("fedgraft.training.client.fit", fails)
    run = start("flex", engine=engine(3), federation={"rounds": 1})
    run.go()
    (line,) = lines(run)
    assert list(line["failed"]) == ["bo"]
    assert list(line["clients"]) == ["ada", "cy"]
    assert [client for question, client, _ in run.up if question == "train"] == ["ada", "cy"]
    monkeypatch.undo()
    other = start("flex", lost=lambda question, number, client: client == "bo" and question == "train", federation={"rounds": 1}).go()
    for key, leaf in other.state.items():
        torch.testing.assert_close(run.state[key], leaf, rtol=0, atol=1e-4)
    versions = run.session.engine.store.versions
    assert max(versions("bo")) < max(versions("ada"))


@pytest.mark.parametrize(("gib", "size"), [(1e-6, 1), (0.1, None), (0.2, None)])
def test_auto_is_as_many_as_fit_the_budget(place, tmp_path, gib, size):
    """By the account's own estimate, whatever else is in memory."""
    session = Session(load_recipe(place.recipe("flex", engine=engine("auto", cohort_gib=gib))), tmp_path, Quiet())
    found, memory = session.engine.cohort, session.account.memory
    assert size in {None, found}
    if size is None:
        assert found * memory.client <= gib * 2**30 < (found + 1) * memory.client


def test_what_cannot_be_done_at_once_is_said_and_done_one_by_one(place, tmp_path):
    heard = Heard()
    recipe = load_recipe(place.recipe("fedavg", engine=engine(2), training={"router_aux": 0.1}))
    session = Session(recipe, tmp_path, heard)
    assert session.engine.cohort == 1
    assert heard.warnings == [
        "engine.cohort: clients train one after another, since training.router_aux is a loss over all rows of a batch"
    ]


@pytest.mark.parametrize("cohort", [0, -1, "all"])
def test_a_wrong_size_is_refused(cohort):
    with pytest.raises(ValueError, match=r"engine\.(inprocess\.)?cohort"):
        load_recipe({"engine": engine(cohort)})
