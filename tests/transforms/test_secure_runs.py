"""Whole runs whose coordinator sees sums alone, in process and over Flower messages."""

from __future__ import annotations

import json
import re

import pytest
import torch

from fedgraft import reach, runner
from fedgraft.aggregation.merges import by_examples
from fedgraft.bundle import Bundle
from fedgraft.engine import flower as flower_engine
from fedgraft.engine.wire import Frame
from fedgraft.report.progress import Quiet
from fedgraft.report.record import write_document
from fedgraft.transforms.secure_aggregation.settings import KEYS, SHARES, TRAIN, UNMASK, SecAggPlus
from fedgraft.tree import num_bytes, raw_bytes
from fedgraft.trouble import Stopped
from tests.contract.test_methods import StopAt
from tests.engine.conftest import grid_of, identity, light, place, start
from tests.engine.test_flower import LEAN, Watch, digests, facts, flower, timeless
from tests.engine.test_simulation import fresh, in_a_process, simulated
from tests.methods.harness import ROWS

__all__ = ["fresh", "grid_of", "identity", "light", "place", "start"]

SECURE = {"name": "secagg_plus"}
FINE = {**SECURE, "quantisation_bits": 32, "modulus_bits": 64}


@pytest.mark.parametrize("method", ["fedavg", "flex", "fedadam"])
def test_the_state_is_that_of_plain_replies_within_a_step(start, method):
    """After one round each shared number differs by less than a step (Adam's step divides by the change itself, so there it is looser)."""
    plain = start(method, federation={"rounds": 1}).go()
    masked = start(method, federation={"rounds": 1}, secure_aggregation=SECURE).go()
    limit = 1e-4 if method == "fedadam" else SecAggPlus().step + 1e-7
    assert any(not torch.equal(leaf, plain.state[key]) for key, leaf in masked.state.items())
    for key, leaf in masked.state.items():
        assert (leaf - plain.state[key]).abs().max() <= limit
    for name in ROWS:
        assert masked.memory(name).digest() == plain.memory(name).digest()


@pytest.mark.parametrize("method", ["fedavg", "flex"])
def test_with_fine_steps_a_run_is_the_plain_one_but_for_rounding(start, method):
    plain, masked = (start(method, **({"secure_aggregation": one} if one else {})).go() for one in (None, FINE))
    for key, leaf in masked.state.items():
        torch.testing.assert_close(leaf, plain.state[key], rtol=1e-4, atol=1e-6)


def test_two_runs_of_a_seed_have_other_keys_and_the_same_bits(start):
    first, second = (start("flex", federation={"rounds": 2}, secure_aggregation=SECURE).go() for _ in range(2))
    assert first.digest == second.digest
    masked = [{content for question, _, content in run.up if question == TRAIN} for run in (first, second)]
    assert not masked[0] & masked[1]


def test_what_the_coordinator_gets_in_a_run(start):
    """Masked leaves of the same size, no leaf of any client's own training, no rows; the record tells the rest."""
    run = start("flex", federation={"rounds": 1}, secure_aggregation=SECURE).go()
    asked = [question for question, _, _ in run.up]
    assert [asked.count(question) for question in (KEYS, SHARES, TRAIN, UNMASK)] == [3, 3, 3, 3]
    trained = {name: run.memory(name).tree("trained") for name in ROWS}
    assert all(trained.values())
    for question, _, content in run.up:
        reply = Bundle.decode(content)
        if question == TRAIN:
            assert set(reply.trees) == {"masked"}
            assert num_bytes(reply.tree("masked")) == num_bytes(run.state)
            assert "examples" not in reply.facts
        elif question in {KEYS, SHARES, UNMASK}:
            assert not reply.trees
        for leaves in trained.values():
            assert not any(raw_bytes(leaf) in content for leaf in leaves.values())
    line = json.loads((run.session.folder / "rounds.jsonl").read_text())
    assert set(line["clients"]) == set(ROWS)
    assert line["bytes_up"] == sum(len(content) for question, _, content in run.up if question in {KEYS, SHARES, TRAIN, UNMASK})
    assert "unopened" not in line
    assert "secure_aggregation" in (run.session.folder / "recipe.yaml").read_text()


@pytest.mark.parametrize("question", [KEYS, SHARES, TRAIN, UNMASK])
def test_a_client_that_drops_out_anywhere_is_survived(start, question):
    """The state is that of a plain run which lost the same client's training reply, or none where the reply was in the sum."""
    out = start(
        "fedavg", lost=lambda asked, number, client: (asked, client) == (question, "bo"), federation={"rounds": 1}, secure_aggregation=FINE
    ).go()
    lose = "" if question == UNMASK else "bo"
    plain = start("fedavg", lost=lambda asked, number, client: (asked, client) == ("train", lose), federation={"rounds": 1}).go()
    for key, leaf in out.state.items():
        torch.testing.assert_close(leaf, plain.state[key], rtol=0, atol=1e-7)


def test_too_few_leave_the_state_and_say_who_was_missing(start):
    """In round 2 one of three is left and two are needed; the round after goes on as if that one had merged nothing."""
    watch = Watch()
    run = start(
        "fedavg", lost=lambda question, number, client: (question, number) == (TRAIN, 1) and client != "cy", secure_aggregation=SECURE
    )
    run.session.progress = watch
    states = []
    commit = run.session._commit
    run.session._commit = lambda **more: (states.append(run.session.server.state.digest()), commit(**more))  # type: ignore[method-assign]
    run.go()
    assert states[1] == states[2]
    assert len(set(states)) == 3  # opened with, round 1 = round 2, round 3
    lines = [json.loads(line) for line in (run.session.folder / "rounds.jsonl").read_text().splitlines()]
    said = "no sum is opened, because 1 of 3 clients sent masked changes and 2 are needed; missing: ada, bo"
    assert [line.get("unopened") for line in lines] == [None, said, None]
    assert f"round 2: {said}. The shared leaves stay as they are" in watch.warnings


def test_simulated_absence_is_borne(start):
    """Some are not asked and some are late; late ones have sent a masked vector that is in no sum."""
    federation = {"rounds": 4, "dropout": 0.2, "deadline": 4.0, "jitter": 0.6}
    run = start("flex", federation=federation, secure_aggregation=FINE).go()
    lines = [json.loads(line) for line in (run.session.folder / "rounds.jsonl").read_text().splitlines()]
    assert any(line["simulated"].get("late") for line in lines)
    for line in lines:
        assert ("unopened" in line) == (len(line["clients"]) < 2)
    again = start("flex", federation=federation, secure_aggregation=FINE).go()
    assert again.digest == run.digest


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_stopped_in_the_middle_ends_with_the_same_bits(place, tmp_path, step):
    """Within and between rounds: the round that is begun again has new keys."""
    recipe = place.recipe("flex", federation={"rounds": 2}, secure_aggregation=SECURE)
    whole = runner.run(recipe, out=tmp_path / "whole", progress=Quiet())
    with pytest.raises(KeyboardInterrupt):
        runner.run(recipe, out=tmp_path / "stopped", progress=StopAt("training", step))
    runner.resume(tmp_path / "stopped", progress=Quiet())
    assert (tmp_path / "stopped" / "digest.txt").read_text() == (whole.folder / "digest.txt").read_text()


@pytest.mark.parametrize("question", [KEYS, SHARES, TRAIN, UNMASK])
def test_a_run_that_dies_at_any_stage_ends_with_the_same_bits(start, question):
    """It ends in the second round, after a client has answered and before the coordinator hears of it."""
    whole = start("flex", federation={"rounds": 2}, secure_aggregation=SECURE).go()

    def die(asked, number, client):
        if (asked, number, client) == (question, 1, "bo"):
            raise KeyboardInterrupt
        return False

    run = start("flex", lost=die, federation={"rounds": 2}, secure_aggregation=SECURE)
    with pytest.raises(Stopped):
        run.go()
    assert json.loads((run.session.folder / "rounds.jsonl").read_text())["round"] == 0
    write_document(run.session.folder / "environment.json", run.session.environment())
    record = runner.resume(run.session.folder, progress=Quiet())
    assert (record.folder / "digest.txt").read_text() == whole.digest


def test_over_a_grid_it_is_the_run_in_process(place, tmp_path, grid_of):
    recipe = place.recipe("flex", **LEAN, secure_aggregation=SECURE)
    here = runner.run(recipe, out=tmp_path / "here")
    grid, received = grid_of(), list[bytes]()
    pull = grid.pull_messages

    def heard(numbers):
        messages = pull(numbers)
        received.extend(Frame.of_records(message.content).content for message in messages)
        return messages

    grid.pull_messages = heard
    afar = runner.run(flower(recipe), out=tmp_path / "afar", connect=reach.over(grid))
    trained = [leaf for path in (tmp_path / "sites").rglob("memory-*") for leaf in Bundle.load(path).tree("trained").values()]
    assert trained
    assert len(received) > 24
    assert not any(raw_bytes(leaf) in content for leaf in trained for content in received)
    assert digests(afar.folder, tmp_path / "sites") == digests(here.folder)
    # packages with shares and keys are as long as chance has them, so bytes differ
    strip = lambda record: ([{**line, "bytes_down": 0} for line in timeless(record)[0]], *timeless(record)[1:])  # noqa: E731
    assert strip(afar) == strip(here)
    assert facts(afar) == facts(here)


@pytest.mark.parametrize(
    ("question", "fate"),
    [(KEYS, "down"), (SHARES, "late"), (TRAIN, "late"), (TRAIN, "down"), (TRAIN, "error"), (TRAIN, "damaged"), (UNMASK, "error")],
)
def test_what_a_network_does_at_any_stage_is_survived_and_told(place, tmp_path, grid_of, question, fate):
    def decide(frame):
        return fate if (frame.facts.get("question"), frame.facts.get("client")) == (question, "bo") else ""

    watch = Watch()
    recipe = flower(place.recipe("fedavg", federation={"rounds": 1}, secure_aggregation=SECURE))
    record = runner.run(recipe, out=tmp_path / "run", progress=watch, connect=reach.over(grid_of(fate=decide)))
    (line,) = record.rounds
    assert "unopened" not in line
    assert ("failed" in line) == (question != UNMASK)
    assert len(watch.warnings) == 1
    end = "is in the sum all the same" if question == UNMASK else "its own state is kept on its side"
    assert re.search(end, watch.warnings[0])


@pytest.mark.deploy
def test_in_flowers_simulation_it_is_the_run_in_process(place, tmp_path, fresh):
    """Clients are in several processes, so their secrets have to lie on the disk from question to question."""
    recipe = place.recipe("flex", **LEAN, secure_aggregation=SECURE)
    here = runner.run(recipe, out=tmp_path / "here")
    jobs = [{"recipe": simulated(recipe), "out": str(tmp_path / "there"), "stop": 4}, {"folder": str(tmp_path / "there")}]
    assert in_a_process(jobs) == ["stopped", here.digest]


def test_clients_that_train_at_once_mask_each_its_own(start):
    engine = {"name": "inprocess", "cohort": 3}
    plain, masked = (start("fedavg", federation={"rounds": 1}, engine=engine, **more).go() for more in ({}, {"secure_aggregation": FINE}))
    assert {len(content) > 1000 for question, _, content in masked.up if question == TRAIN} == {True}
    for key, leaf in masked.state.items():
        torch.testing.assert_close(leaf, plain.state[key], rtol=0, atol=1e-7)


def test_without_flower_it_is_refused_with_the_extra(start, monkeypatch):
    monkeypatch.setattr(flower_engine, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"secure_aggregation.name: needs flwr, .*pip install 'fedgraft\[flower\]', or set it to none"):
        start("fedavg", secure_aggregation=SECURE)


def test_means_are_the_merges_that_a_client_can_weigh_by_itself():
    assert by_examples.linear
    assert by_examples.weight is not None
