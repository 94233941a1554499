"""The figures of membership inference beside their brute-force twins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st

from fedgraft.data.partition import load_clients
from fedgraft.recipe import load_recipe
from fedgraft.runner import run
from tests.methods.conftest import place
from tests.strategies import given
from tools.leakage import attacked, auc, table, trained_rows, true_positives

__all__ = ["place"]

SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, 3.0]), min_size=1, max_size=12).map(np.array)


@given(members=SCORES, others=SCORES)
def test_auc_counts_pairs(members, others):
    pairs = [1.0 if member > other else 0.5 if member == other else 0.0 for member in members for other in others]
    assert auc(members, others) == pytest.approx(sum(pairs) / len(pairs))


@given(members=SCORES, others=SCORES, level=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.99]))
def test_true_positives_are_those_of_the_best_threshold_that_is_allowed(members, others, level):
    allowed = [cut for cut in [-np.inf, *members, *others] if (others > cut).sum() <= level * len(others)]
    assert true_positives(members, others, level) == max((members > cut).mean() for cut in allowed)


def test_members_are_the_rows_that_a_run_of_so_many_steps_has_seen():
    """13 rows, 2 rounds of 3 steps of 2: 12 different ones; 5 rows: all."""
    recipe = load_recipe({"data": {"train_rows": 13}, "federation": {"rounds": 2}, "training": {"steps": 3, "batch_size": 2}})
    for few, seen in ((13, 12), (5, 5)):
        client = load_clients(recipe.data.model_copy(update={"train_rows": few}), 0)[0]
        rows = trained_rows(client, recipe)
        assert len({row.id for row in rows}) == len(rows) == seen
        assert all(row in client.train for row in rows)


def test_a_run_is_attacked_in_every_model_that_somebody_sees(place, tmp_path):
    """A client without leaves of its own has no personal model beside the shared one."""
    sections = {"federation": {"rounds": 2}, "training": {"steps": 2, "batch_size": 4}}
    record = run(place.recipe("flex", clients=("ada", "bo"), **sections), out=tmp_path / "run")
    found = attacked(record.folder, 5)
    asked = {(model, attack) for model in ("sent", "shared", "personal") for attack in ("loss", "calibrated")}
    assert found.keys() == asked | {("base", "loss")}
    assert all(len(values) == 2 and all(0 <= figure <= 1 for figure in figures) for values in found.values() for figures in values)
    assert len(table({"flex": found}).splitlines()) == 2 + 7
    alone = attacked(run(place.recipe("fedavg", clients=("ada", "bo"), **sections), out=tmp_path / "fedavg").folder, 5)
    assert {model for model, _ in alone} == {"base", "sent", "shared"}
