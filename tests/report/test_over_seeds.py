"""Groups, their means and deviations over seeds, and the section of the page."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest

from fedgraft.report import paired
from fedgraft.report.groups import grouped
from fedgraft.report.html import comparison_page
from fedgraft.report.over_seeds import section, seed_tables, several_seeds
from tests.report.conftest import made_record
from tests.report.parsed import parse


def made(method: str, seed: int, losses: dict[str, float], folder: str | None = None):
    """A run with these personal losses."""
    record = made_record(list(losses), folder=Path(folder or f"sweep/{method}_seed-{seed}"))
    record.recipe.update(method={"name": method}, seed=seed)
    for client, loss in losses.items():
        record.results[client]["personal"]["loss"] = loss
    return record


RNG = np.random.default_rng(1)
LOSSES = {(method, seed): dict(zip("abc", RNG.normal(3, 1, 3).tolist(), strict=True)) for method in ("fedavg", "flex") for seed in range(3)}
RUNS = [made(method, seed, losses) for (method, seed), losses in LOSSES.items()]


def test_mean_and_deviation_are_those_of_the_means_over_clients():
    loss = seed_tables(RUNS)[0]
    assert (loss.figure, loss.baseline, [row.name for row in loss.rows]) == ("loss", "fedavg", ["fedavg", "flex"])
    for row in loss.rows:
        means = [statistics.fmean(LOSSES[row.name, seed].values()) for seed in range(3)]
        assert row.seeds == [0, 1, 2]
        assert row.mean == pytest.approx(statistics.fmean(means))
        assert row.std == pytest.approx(statistics.stdev(means))


def test_the_comparison_is_that_of_the_two_groups():
    flex = seed_tables(RUNS)[0].rows[1]
    own, reference = ({seed: LOSSES[method, seed] for seed in range(3)} for method in ("flex", "fedavg"))
    assert flex.against == paired.compare(own, reference)  # a single comparison is not corrected
    assert seed_tables(RUNS)[0].rows[0].against is None


def test_p_is_corrected_for_the_comparisons_of_a_table():
    third = [
        made("local", seed, {client: value + 0.3 * RNG.normal() for client, value in LOSSES["flex", seed].items()}) for seed in range(3)
    ]
    rows = seed_tables([*RUNS, *third])[0].rows
    alone = [seed_tables([*RUNS[:3], *runs])[0].rows[1].against.t.p for runs in (RUNS[3:], third)]
    assert [row.against.t.p for row in rows[1:]] == pytest.approx(paired.holm(alone))


def test_the_baseline_is_chosen_by_name():
    table = seed_tables(RUNS, "flex")[0]
    assert [row.against is None for row in table.rows] == [False, True]
    assert table.rows[0].against.difference == pytest.approx(-seed_tables(RUNS)[0].rows[1].against.difference)
    with pytest.raises(ValueError, match=r"--baseline flx: no such group \(did you mean 'flex'\?\); there are: fedavg, flex"):
        seed_tables(RUNS, "flx")


def test_where_the_first_group_lacks_a_figure_the_next_is_the_baseline_and_never_in_place_of_one_that_was_named():
    runs = [made(method, seed, losses) for (method, seed), losses in LOSSES.items()]
    for run in runs[:3]:
        for models in run.results.values():
            del models["personal"]["loss"]
    third = [made("local", seed, LOSSES["flex", seed]) for seed in range(3)]
    loss = seed_tables([*runs, *third])[0]
    assert (loss.baseline, [row.against is None for row in loss.rows]) == ("flex", [True, False])
    assert all(row.against is None for row in seed_tables([*runs, *third], "fedavg")[0].rows)


def test_runs_of_other_recipes_are_other_groups_named_without_their_seed():
    other = [made("flex", seed, LOSSES["flex", seed], f"sweep/flex_low_seed-{seed}") for seed in range(2)]
    for record in other:
        record.recipe["graft"] = {"gate_start": "low"}
    assert [(group.name, len(group.runs)) for group in grouped([*RUNS[3:], *other])] == [("flex (flex)", 3), ("flex (flex_low)", 2)]


def test_the_same_seed_twice_is_not_one_group():
    twin = made("flex", 1, LOSSES["flex", 1], "elsewhere/run")
    groups = grouped([RUNS[3], RUNS[4], twin, RUNS[5]])
    assert [len(group.runs) for group in groups] == [3, 1]
    assert len({group.name for group in groups}) == 2


def test_too_few_seeds_are_said_so():
    table = seed_tables([RUNS[0], RUNS[1], RUNS[3], RUNS[4]])[0]
    assert (table.columns[4:], table.cells()[1][4:]) == (["test"], ["too few seeds"])
    single = seed_tables([RUNS[0], RUNS[4]])[0]
    assert single.rows[0].std is None
    assert single.cells()[1][3:] == ["no common seed", "too few seeds"]
    assert "±" not in single.cells()[0][2]


def test_a_page_of_single_runs_has_no_section_over_seeds():
    single = [RUNS[0], RUNS[3]]
    assert not several_seeds(single)
    assert section(single) == []
    assert 'id="seeds"' not in comparison_page(single)


def test_the_page_shows_mean_deviation_and_tests():
    page = comparison_page(RUNS, "fedavg")
    assert 'id="seeds"' in page
    row = seed_tables(RUNS)[0].cells()[1]
    assert "±" in row[2]
    assert all(f"<td>{cell}</td>" in page for cell in row[2:4])
    assert "Holm" in page
    assert "differences to fedavg (lower is better)" in page
    assert page == comparison_page(RUNS, "fedavg")
    assert parse(page)
