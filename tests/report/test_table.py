"""Tables as plain data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedgraft.report.groups import labels
from fedgraft.report.record import Record
from fedgraft.report.table import compare_tables, cost, run_tables


def record(method, folder, **clients):
    """A record with losses {client: {model: loss}}."""
    results = {
        client: {model: {"loss": loss, "token_accuracy": 1 - loss / 10} for model, loss in losses.items()}
        for client, losses in clients.items()
    }
    rounds = [
        {"bytes_up": 10, "bytes_down": 20, "tokens": 5, "seconds": 0.5},
        {"bytes_up": 20, "bytes_down": 25, "tokens": 6, "seconds": 1.0},
    ]
    recipe = {"method": {"name": method}, "seed": 0}
    return Record(folder=Path(folder), recipe=recipe, environment={}, rounds=rounds, finishes=[], selection={}, results=results, digest="d")


FLEX = record("flex", "runs/a", ben={"base": 4.0, "personal": 2.0}, ada={"base": 3.0, "trained": 2.5, "personal": 1.0})
FEDAVG = record("fedavg", "runs/b", ben={"base": 4.0, "personal": 3.0}, ada={"base": 3.0, "personal": 2.0})


def test_a_run_has_a_table_per_measured_figure():
    loss, accuracy = run_tables(FLEX)
    assert (loss.figure, accuracy.figure) == ("loss", "token_accuracy")
    assert set(loss.columns) == {"base", "trained", "personal"}
    assert list(loss.clients) == ["ada", "ben"]
    assert loss.clients["ben"] == {"base": 4.0, "personal": 2.0}  # never trained: no such value, rather than 0
    assert loss.summary["mean"] == {"base": 3.5, "trained": 2.5, "personal": 1.5}
    assert loss.summary["std"]["personal"] == pytest.approx(0.5**0.5)
    assert loss.summary["worst"]["personal"] == 2.0
    assert accuracy.summary["worst"]["personal"] == pytest.approx(0.8)


def test_models_come_in_the_order_of_their_meaning():
    assert run_tables(FLEX)[0].columns == ["base", "trained", "personal"]


def test_compared_are_the_personal_models_beside_the_base():
    loss = compare_tables([FLEX, FEDAVG])[0]
    assert loss.columns == ["base", "flex", "fedavg"]
    assert loss.clients == {"ada": {"base": 3.0, "flex": 1.0, "fedavg": 2.0}, "ben": {"base": 4.0, "flex": 2.0, "fedavg": 3.0}}
    assert set(loss.as_dict()) == {"figure", "title", "columns", "clients", "summary"}


def test_runs_of_one_method_are_told_apart_by_their_folder():
    again = record("flex", "runs/c", ada={"base": 3.0, "personal": 1.5})
    assert labels([FLEX, FEDAVG, again]) == ["flex (a)", "fedavg", "flex (c)"]
    assert compare_tables([FLEX, again])[0].columns == ["base", "flex (a)", "flex (c)"]


def test_runs_of_one_method_in_folders_of_one_name_are_told_apart():
    """A label is a column: two equal ones would hide a run."""
    twins = [record("flex", f"seed{seed}/out", ada={"base": 3.0, "personal": float(seed)}) for seed in (1, 2)]
    assert len(set(labels(twins))) == 2
    assert compare_tables(twins)[0].clients["ada"] == {"base": 3.0, labels(twins)[0]: 1.0, labels(twins)[1]: 2.0}


def test_runs_that_differ_only_in_their_seed_are_one_column_of_means():
    other = record("flex", "runs/c", ben={"base": 5.0, "personal": 4.0}, ada={"base": 3.0, "personal": 1.5}, zoe={"personal": 9.0})
    other.recipe["seed"] = 1
    loss = compare_tables([FLEX, FEDAVG, other])[0]
    assert loss.columns == ["base", "flex", "fedavg"]
    assert loss.clients["ben"] == {"base": 4.5, "flex": 3.0, "fedavg": 3.0}
    assert loss.clients["ada"]["flex"] == 1.25
    assert loss.clients["zoe"] == {"flex": 9.0}  # the data of another seed may have other clients


def test_cost_is_per_round_and_in_all():
    """What follows the last round is none of the rounds, and part of the whole."""
    rounds = {"rounds": 2, "bytes_up_per_round": 15, "bytes_down_per_round": 22}
    assert cost(FLEX) == {**rounds, "bytes_up": 30, "bytes_down": 45, "training_tokens": 11, "training_seconds": 1.5}
    finish = {"round": 2, "bytes_up": 1, "bytes_down": 7, "tokens": 4, "seconds": 0.25}
    finished = cost(dataclasses.replace(FLEX, finishes=[finish]))
    assert finished == {**rounds, "bytes_up": 31, "bytes_down": 52, "training_tokens": 15, "training_seconds": 1.75}
