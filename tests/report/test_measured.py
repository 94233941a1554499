"""Sections of one run's page about what was measured beyond quality, and about what the run took."""

from __future__ import annotations

import pytest

from fedgraft.report.html import run_page
from tests.report.parsed import parse, tables


@pytest.fixture(scope="module")
def page():
    from tests.report.conftest import measured_record

    return parse(run_page(measured_record()))


@pytest.fixture(scope="module")
def told(page):
    return tables(page)


def test_every_figure_of_a_measured_run_is_there(page):
    drawn = {figure.attributes["id"] for figure in page.all("figure")}
    assert drawn == {
        *("quality-dots", "training-loss", "learning-rate", "chosen-experts", "choice-errors"),
        *("gate-means", "graft-dominates", "gate-histogram", "gates-by-client", "gates-by-layer"),
        *("routing-balance", "routing-token-entropy", "routing-agreement", "routing-drift", "utilisation", "utilisation-by-client"),
        *("cross", "unseen-curve", "partition", "bytes", "seconds", "speed"),
    }


def test_the_headline_has_intervals_and_gains(told):
    headline = told["All clients: figures x models"]
    assert headline["response loss (nats/token), lower is better"] == ["3.510", "3.010"]
    assert headline["mean, 95 % interval"] == ["3.250 to 3.750", "2.750 to 3.250"]
    assert headline["gain over base"] == ["–", "-0.100"]  # the last of that name: loss on general text


def test_gates_and_routers_are_told_before_and_after(told):
    gates = told["Share of tokens by tenths of the gate"]
    assert gates["0.0 to 0.1"] == ["50.00 %"] * 3
    assert gates["0.1 to 0.2"] == ["25.00 %"] * 3
    assert told["Tokens that the graft dominates per client and MoE layer"]["client-01"] == ["12.50 %"] * 2
    assert told["Balance of the experts by layer"]["1"] == ["0.7500", "0.5000", "0.5000", "0.5000"]
    assert told["Drift of the experts' inputs by layer"]["1"] == ["0.0200"] * 3
    assert " → " in told["Utilisation of the experts per layer and expert"]["layer 0"][0]


def test_each_others_models_and_unseen_clients_are_told(page, told):
    matrix = told["Response loss of each client's personal model on each client's rows per client and model"]
    assert matrix["client-01"] == ["3.500", "3.000", "3.500"]
    figure = page.one("figure", id="cross")
    assert "3 of 3 clients their own model is the best; another client's is +0.500" in figure.one("desc").text
    assert "3.500 with 0 rows, 3.400 with 1 row, 3.300 with 2 rows" in page.one("figure", id="unseen-curve").one("desc").text
    facts = {row.one("dt").text: row.one("dd").text for row in page.one("header").all("div")}
    assert facts["clients"] == "3, and 2 unseen"


def test_what_a_run_took_is_told_by_phase_and_session(page, told):
    caption = "Seconds by phase, and peak memory of this process, each time the run was taken up"
    assert told[caption] == {
        "phase": ["session 1, to round 1", "session 2, to round 3"],
        "loading": ["1.0", "1.5"],
        "selection": ["2.0", "–"],
        "training": ["3.0", "6.0"],
        "evaluation": ["–", "2.5"],
        "all phases": ["6.0", "10.0"],
        "peak memory": ["1.5 GB", "2 GB"],
        "energy of the processors": ["0.50 Wh", "1.50 Wh"],
    }
    assert told["FLOPs per token of one forward, counted from shapes"]["in all"] == ["1.25 kFLOP", "125.0 %"]
    facts = {row.one("dt").text: row.one("dd").text for row in page.one("section", id="cost").all("div") if len(row.all("dt")) == 1}
    assert (facts["trained by a client"], facts["of these travelling"], facts["of these private"]) == ("388 k", "55.3 k", "333 k")


def test_a_run_that_kept_no_cost_says_so(make):
    assert "was not recorded with this run (cost.json)" in parse(run_page(make())).one("section", id="cost").text
