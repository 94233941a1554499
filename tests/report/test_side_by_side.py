"""Sections of a comparison: spread over seeds, many runs, and what the runs have in common."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fedgraft.report.html import comparison_page
from fedgraft.report.seed_spread import ends, over_seeds, told
from tests.report.conftest import measured_record
from tests.report.parsed import parse, tables
from tests.report.test_html import named, seeded


@pytest.fixture(scope="module")
def seeds():
    """One method with three seeds, and one run of another."""
    runs = [measured_record(lift=seed / 10, recipe=seeded(seed)) for seed in range(3)]
    for seed, record in enumerate(runs):
        for line in record.rounds:
            line["loss"] += seed
    return parse(comparison_page([*runs, named("fedavg")]))


@pytest.fixture(scope="module")
def many():
    return parse(comparison_page([named(f"m{at}", at) for at in range(12)]))


def test_curves_have_the_mean_over_seeds_and_their_range(seeds):
    figure = seeds.one("figure", id="training-loss")
    assert len(figure.all("path", class_="band")) == 1  # of the three seeds; the single run has none
    assert tables(seeds)["Mean training loss per round"]["1"] == ["4.000 (3.000 to 5.000)", "3.000"]
    assert "from the lowest seed to the highest" in figure.text
    assert tables(seeds)["Drift of the experts' inputs by layer"]["0"] == ["0.1100 (0.0100 to 0.2100)", "0.0100"]


def test_a_round_that_some_seeds_have_not_reached_is_of_the_others():
    found = over_seeds([{1: 2.0, 2: 4.0}, {1: 4.0}, {1: math.nan}])
    assert found == {1: (3.0, 2.0, 4.0), 2: (4.0, 4.0, 4.0)}
    assert [told(found, at) for at in (1, 2, 3)] == ["3.000 (2.000 to 4.000)", "4.000", "–"]
    assert math.isnan(over_seeds([{1: math.nan}])[1][0])


def test_many_values_are_told_by_their_ends():
    assert ends({"a": 1.0, "b": 2.0}) == "a 1.000; b 2.000"
    assert ends({f"m{at}": at / 2 for at in range(9)}, 1) == "9 from 0.0 (m0) to 4.0 (m8)"


def test_experts_of_runs_that_measured_them_are_side_by_side(seeds):
    table = tables(seeds)["Gates, grafts and routers"]
    assert table["flex"] == ["0.350", "12.50 %", "0.7500", "0.6000", "0.9450", "0.1150"]  # means over 3 seeds and 2 layers
    assert table["fedavg"] == ["0.250", "12.50 %", "0.7500", "0.5000", "0.9450", "0.0150"]


def test_gates_of_single_tokens_are_side_by_side(seeds):
    table = tables(seeds)["Gates of single tokens by run per run and tenth of the gate"]
    assert table["flex"][:4] == ["50.00 %", "25.00 %", "25.00 %", "0.00 %"]
    assert table["flex"] == table["fedavg"]


def test_each_others_models_are_told_by_run_as_means_over_seeds():
    runs = [measured_record(recipe=seeded(seed)) for seed in range(2)]
    runs[1].further["cross"]["client-00"]["client-01"] = 2.5  # 3.5 in the other seed, so 3.0 on average: level with the own
    runs[1].further["cross"]["client-01"]["client-00"] = 2.0  # and 2.75, which is better than the own 3.0
    root = parse(comparison_page([*runs, named("fedavg")]))
    table = tables(root)["Own and others' models"]
    assert table["fedavg"] == ["3 of 3", "+0.500"]
    assert table["flex"] == ["2 of 3", "+0.292"]  # (4 x 0.5 + 0 - 0.25) / 6
    matrix = tables(root.one("section", id="others"))
    told = next(rows for name, rows in matrix.items() if "rows, flex per" in name)
    assert told["client-01"] == ["2.750", "3.000", "3.500"]


def test_of_many_runs_no_matrix_is_drawn(many):
    section = many.one("section", id="others")
    assert not section.all("figure")
    assert "on its own page" in section.text


def test_unseen_clients_are_told_by_run_and_rows(seeds):
    table = next(value for name, value in tables(seeds).items() if name.endswith("by training rows adapted with"))
    assert table["run"] == ["0 rows", "1 rows", "2 rows"]
    assert table["fedavg"] == ["3.500", "3.400", "3.300"]
    assert table["flex"] == ["3.600 (3.500 to 3.700)", "3.500 (3.400 to 3.600)", "3.400 (3.300 to 3.500)"]


def test_bytes_and_quality_has_a_mark_for_each_seed(seeds):
    figure = seeds.one("figure", id="bytes-quality")
    assert len(figure.all("div")[0].all("path", class_="mark")) == 4
    assert "A mark for each seed." in figure.text


def test_of_many_runs_each_is_a_row_that_can_be_sorted(many):
    told_tables = tables(many)
    headline = told_tables["Mean over clients, with its 95 % interval: runs x figures"]
    assert headline["m3"][0] == "3.010 (2.750 to 3.250)"
    assert headline["base"][1:] == ["0.300", "4.000"]
    loss = told_tables["response loss (nats/token)"]
    assert loss["run"][:2] == ["mean", "std"]
    assert loss["run"][-1] == "client-02"
    assert (loss["m3"][0], loss["m3"][-1]) == ("3.010", "3.020")
    assert told_tables["Keys in which the recipes differ"]["m4"] == ["m4"]
    by_label = {table.attributes["aria-label"]: table for table in many.all("table")}
    assert "data-sorts" in by_label["response loss (nats/token)"].attributes


def test_where_many_runs_differ_in_many_keys_each_names_its_own():
    runs = [named(f"m{at}") for at in range(9)]
    for at, record in enumerate(runs):
        record.recipe["method"].update({f"own{number}": number for number in range(at)})
    table = tables(parse(comparison_page(runs)))["Keys in which the recipes differ"]
    assert table["m2"] == ["method.name m2; method.own0 0; method.own1 1"]


def test_the_gains_of_many_runs_are_a_heat_map(many):
    assert not [figure for figure in many.all("figure") if figure.attributes["id"] == "quality-dots"]
    assert tables(many)["Gain of each client over base per run and client"]["m3"] == ["+0.500"] * 3


def test_no_two_of_sixteen_series_look_the_same():
    page = parse(comparison_page([named(f"m{at}", at) for at in range(16)]))
    for figure, kind in (("bytes-quality", "mark"), ("training-loss", "line")):
        legend = page.one("figure", id=figure).one("ul", class_="legend")
        looks = [entry.one("path").attributes["class"] for entry in legend.all("li")]
        assert all(kind in look for look in looks)
        assert len(set(looks)) == 16


def test_the_same_rows_are_drawn_once_and_others_told_by_run(seeds, make):
    assert seeds.one("figure", id="partition")
    other = dataclasses.replace(make(), environment=make().environment | {"clients": {"a": {"talk": 3}, "b": {"talk": 1, "sums": 4}}})
    root = parse(comparison_page([named("flex"), dataclasses.replace(other, recipe=seeded(7, "fedavg"))]))
    assert tables(root)["Who has what"]["fedavg"] == ["2", "8", "3", "5", "1.5"]


def test_what_runs_ran_on_is_told_once_where_it_is_the_same(make):
    other = dataclasses.replace(named("fedavg"), environment=make().environment | {"packages": {"torch": "9.9"}, "started": "later"})
    root = parse(comparison_page([named("flex"), other]))
    section = root.one("section", id="environment")
    assert {row.one("dt").text for row in section.all("div") if row.all("dt")} == {"fedgraft"}
    assert tables(section)["What differs"] == {"run": ["packages.torch"], "flex": ["2.13.0"], "fedavg": ["9.9"]}


def test_what_no_run_measured_is_said(make):
    root = parse(comparison_page([make(environment={}), make(environment={}, recipe=seeded(8))]))
    said = {name: root.one("section", id=name).text for name in ("experts", "others", "unseen", "data", "environment", "differences")}
    assert "evaluation.cross" in said["others"]
    assert "evaluation.experts" in said["experts"]
    assert "evaluation.unseen.clients" in said["unseen"]
    assert "No environment was written" in said["data"]
    assert "No environment was written" in said["environment"]
    assert "the same in every key, but for their seeds" in said["differences"]
