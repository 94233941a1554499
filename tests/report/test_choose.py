"""Nothing is chosen by test rows, and what is chosen is the best."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedgraft.report.choose import choose
from fedgraft.report.html import comparison_page
from fedgraft.report.record import check_one_split


@pytest.fixture
def tried(make):
    """`tried(method, lr, {client: loss}, seed=0)`: a run evaluated on validation rows."""

    def build(method, lr, losses, seed=0, split="validation", **changes):
        record = make(list(losses))
        recipe = {**record.recipe, "method": {"name": method}, "training": {"lr": lr}, "seed": seed, **changes}
        recipe["evaluation"] = {**recipe["evaluation"], "split": split}
        results = {name: {"personal": {"loss": loss, "token_accuracy": loss / 10}} for name, loss in losses.items()}
        return replace(record, folder=Path(f"runs/{method}-{lr}-{seed}"), recipe=recipe, results=results, split=split)

    return build


def test_the_best_of_each_method_by_the_mean_over_seeds_of_the_mean_over_clients(tried):
    """Seed 2, which only one candidate has, does not count: it would make 1e-3 the worse one."""
    records = [
        tried("flex", 1e-3, {"ada": 2.0, "ben": 4.0}, seed=0),
        tried("fedavg", 1e-3, {"ada": 3.5, "ben": 3.5}),
        tried("flex", 1e-3, {"ada": 2.2, "ben": 4.0}, seed=1),
        tried("flex", 1e-3, {"ada": 9.0, "ben": 9.0}, seed=2),
        tried("flex", 2e-3, {"ada": 1.0, "ben": 5.4}, seed=0),
        tried("flex", 2e-3, {"ada": 1.0, "ben": 5.4}, seed=1),
        tried("flex", 4e-3, {"ada": 5.0, "ben": 5.4}, seed=0),
        tried("flex", 4e-3, {"ada": 5.0, "ben": 5.4}, seed=1),
    ]
    flex, fedavg = choose(records, "loss")
    assert (flex.method, flex.settings, flex.candidates, flex.seeds) == ("flex", {"training.lr": 1e-3}, 3, [0, 1])
    assert (flex.value, flex.runner_up) == (pytest.approx((3.0 + 3.1) / 2), pytest.approx(3.2))
    assert flex.edges == ["training.lr"]
    assert (fedavg.method, fedavg.settings, fedavg.runner_up, fedavg.edges) == ("fedavg", {}, None, [])
    assert choose(records, "token_accuracy")[0].settings == {"training.lr": 4e-3}  # there more is better


def test_a_task_s_figure_may_choose(tried):
    records = [tried("flex", lr, {"ada": 2.0}) for lr in (1e-3, 2e-3)]
    for record, accuracy in zip(records, (0.25, 0.5), strict=True):
        record.results["ada"]["personal"]["arc/acc"] = accuracy
    assert choose(records, "arc/acc")[0].settings == {"training.lr": 2e-3}


def test_a_best_value_between_others_is_no_edge(tried):
    records = [tried("flex", lr, {"ada": loss}) for lr, loss in ((1e-3, 3.0), (2e-3, 2.0), (4e-3, 2.5))]
    assert choose(records, "loss")[0].edges == []


@pytest.mark.parametrize("split", ["test", ""])
def test_one_run_on_test_rows_is_enough_to_refuse(tried, split):
    records = [tried("flex", 1e-3, {"ada": 2.0}), tried("flex", 2e-3, {"ada": 1.0}, split=split)]
    with pytest.raises(ValueError, match=r"flex-0.002-0: .*nothing may be chosen by other than validation rows; run .*split=validation"):
        choose(records, "loss")


def test_what_cannot_be_compared_is_refused(tried):
    one = tried("flex", 1e-3, {"ada": 2.0})
    with pytest.raises(ValueError, match=r"no such figure \(did you mean 'loss'"):
        choose([one], "los")
    with pytest.raises(ValueError, match="'flex': its runs have no seed in common"):
        choose([one, tried("flex", 2e-3, {"ada": 2.0}, seed=1)], "loss")
    with pytest.raises(ValueError, match="'flex': its runs were evaluated on different rows"):
        choose([one, tried("flex", 1e-3, {"ada": 2.0}, data={"dataset": "jsonl"})], "loss")


def test_figures_of_validation_and_test_rows_do_not_stand_side_by_side(tried):
    runs = [tried("flex", 1e-3, {"ada": 2.0}), tried("fedavg", 1e-3, {"ada": 1.0}, split="test")]
    check_one_split(runs[:1])
    check_one_split([runs[1], tried("local", 1e-3, {"ada": 1.0}, split="")])  # an older record does not say
    for refuse in (check_one_split, comparison_page):
        with pytest.raises(ValueError, match=r"fedavg-0.001-0 on test rows, runs/flex-0.001-0 on validation rows; leave one kind out"):
            refuse(runs)
