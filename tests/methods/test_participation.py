"""Missing and late clients in whole runs."""

from __future__ import annotations

import json

import pytest

from fedgraft.bundle import Bundle
from fedgraft.tree import equal
from tests.methods.harness import ROWS


def lines(run):
    return [json.loads(line) for line in (run.session.folder / "rounds.jsonl").read_text().splitlines()]


def test_a_late_client_has_trained_and_only_its_reply_is_lost(start):
    """All beyond the deadline: every graft has moved, every byte was sent, nothing was merged."""
    usual, run = start("flex", federation={"rounds": 1}).go(), start("flex", federation={"rounds": 1, "deadline": 0.1}).go()
    for name in ROWS:
        assert equal(run.memory(name).tree("personal"), usual.memory(name).tree("personal"))
    assert equal(run.state, run.session.reach.holdings.model.fresh_adapters(0))
    (line,) = lines(run)
    assert (line["clients"], line["loss"], line["simulated"]["late"]) == ({}, None, list(ROWS))
    assert line["bytes_up"] == pytest.approx(lines(usual)[0]["bytes_up"], abs=100)  # but for the digits of the seconds it took


def test_a_dropped_client_is_not_asked(start):
    run = start("fedavg", federation={"rounds": 4, "dropout": 0.5}).go()
    asked = [(line["round"], name) for line in lines(run) for name in line["clients"]]
    assert [name for question, name, _ in run.down if question == "train"] == [name for _, name in asked]
    assert {(line["round"], name) for line in lines(run) for name in line.get("simulated", {}).get("dropped", [])} == {
        (number, name) for number in range(4) for name in ROWS
    } - set(asked)
    assert 0 < len(asked) < 12


def test_a_client_that_joins_late_grows_its_graft_when_first_asked(start):
    """What it then has is what selection on its own text gives; before, it is evaluated with the shared leaves alone."""
    usual, run = start("flex").go(), start("flex", federation={"rounds": 3, "join": {"cy": 2}}).go()
    assert [name for question, name, _ in run.down if question == "graft"] == ["ada", "bo"]
    assert [name for question, name, _ in run.down if question == "train"] == ["ada", "bo"] * 2 + list(ROWS)
    assert run.memory("cy").facts["experts"] == usual.memory("cy").facts["experts"]
    never = start("flex", federation={"rounds": 1, "join": {"cy": 2}}).go()
    assert never.memory("cy").trees == {}
    client = never.session.reach.holdings.open("cy")
    (answers,) = [
        never.session.method.answer(
            never.session.method, client, never.session.method.pack(never.session.method, never.session.server, "cy")
        )
    ]
    assert equal(answers["personal"].tree, never.state)


def test_unequal_work_is_the_first_steps_of_the_usual_ones(start):
    """Batches, tokens and record agree with the drawn number of steps."""
    run = start("fedavg", federation={"rounds": 4}, training={"steps": 4, "least_steps": 1})
    full = start("fedavg", federation={"rounds": 4}, training={"steps": 4})
    run.go()
    for line in lines(run):
        for name, steps in line["simulated"]["steps"].items():
            usual = full.session.reach.holdings.open(name).batches(line["round"])[:steps]
            mine = run.session.reach.holdings.open(name).batches(line["round"])
            assert [[batch.ids.tolist() for batch in parts] for parts in mine] == [
                [batch.ids.tolist() for batch in parts] for parts in usual
            ]
            assert line["clients"][name]["tokens"] == sum(batch.tokens for parts in mine for batch in parts)
    assert len({steps for line in lines(run) for steps in line["simulated"]["steps"].values()}) > 2


def test_scaffold_divides_by_the_steps_that_were_done(start, monkeypatch):
    """One step out of four at most: its c_i is that step's gradient, as with a single step planned."""
    one = start("scaffold", clients=("ada",), federation={"rounds": 1}, training={"steps": 1, "batch_size": 2}).go()
    many = start("scaffold", clients=("ada",), federation={"rounds": 1}, training={"steps": 4, "least_steps": 1, "batch_size": 2})
    monkeypatch.setattr(type(many.session.training), "steps_of", lambda *_: 1)
    many.go()
    assert equal(one.memory("ada").tree("control"), many.memory("ada").tree("control"))


@pytest.mark.parametrize("method", ["fedavg", "flex"])
def test_an_empty_round_at_the_start_is_a_round(start, method):
    """Nobody has joined yet."""
    run = start(method, federation={"rounds": 2, "join": dict.fromkeys(ROWS, 1)}).go()
    assert [set(line["clients"]) for line in lines(run)] == [set(), set(ROWS)]
    assert Bundle.decode((run.session.folder / "state" / "state.safetensors").read_bytes()).facts["round"] == 2
