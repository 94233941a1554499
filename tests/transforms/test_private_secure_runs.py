"""Whole runs under client-level privacy whose coordinator sees sums alone, in process and over Flower messages."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fedgraft import reach, runner
from fedgraft.bundle import Bundle
from fedgraft.recipe import load_recipe
from fedgraft.report.progress import Quiet
from fedgraft.report.record import Record
from fedgraft.transforms.accountant import epsilon
from fedgraft.transforms.noise import SECRET
from fedgraft.transforms.secure_aggregation.settings import KEYS, SHARES, TRAIN, UNMASK, SecAggPlus
from fedgraft.tree import count, raw_bytes
from tests.contract.test_methods import StopAt
from tests.engine.conftest import grid_of, identity, light, place, start
from tests.engine.test_flower import LEAN, Watch, digests, flower, timeless
from tests.methods.harness import ROWS

pytest.importorskip("opacus", reason="extra privacy")

__all__ = ["grid_of", "identity", "light", "place", "start"]

SECURE = {"name": "secagg_plus"}
FINE = {**SECURE, "quantisation_bits": 32, "modulus_bits": 64}
CLIPPED = {"name": "client", "clip": 0.01, "noise_multiplier": 0.0}
SHARED = {"name": "client", "clip": 0.01, "noise_multiplier": 1.0, "where": "clients", "least": 2}
ONE = {"rounds": 1}


def within(left, right, limit):
    """No number of two states is further apart."""
    assert left.keys() == right.keys()
    for key, leaf in left.items():
        assert (leaf.double() - right[key].double()).abs().max() <= limit, key


def rounding(run, clip=CLIPPED["clip"], settings=SECURE):
    """How far one number of the mean may be from that of changes which are not rounded: a step, and what shortens a change for it."""
    step = SecAggPlus(**settings).step
    return step * (2 + math.sqrt(count(run.state))) + 1e-7


@pytest.mark.parametrize(("method", "where"), [("fedavg", {"where": "server"}), ("flex", {"where": "clients", "least": 2})])
def test_without_noise_the_state_is_that_of_the_plain_run_within_rounding(start, method, where):
    """Rows are unequal and all weigh the same; a change is shortened by at most step (sqrt(numbers) + 1), spread over all numbers."""
    plain = start(method, federation=ONE, privacy=CLIPPED).go()
    masked = start(method, federation=ONE, privacy={**CLIPPED, **where}, secure_aggregation=SECURE).go()
    within(masked.state, plain.state, rounding(plain))
    fine = start(method, federation=ONE, privacy={**CLIPPED, **where}, secure_aggregation=FINE).go()
    within(fine.state, plain.state, 2e-7)  # float32
    for name in ROWS:
        assert masked.memory(name).digest() == plain.memory(name).digest()


def test_the_coordinators_noise_is_that_of_the_plain_run(start):
    """The same stream on a sum of which it never sees the parts: within rounding the same state."""
    noised = {**CLIPPED, "noise_multiplier": 1.0}
    plain = start("fedavg", federation=ONE, privacy=noised).go()
    masked = start("fedavg", federation=ONE, privacy=noised, secure_aggregation=SECURE).go()
    within(masked.state, plain.state, rounding(plain))


def test_shares_of_the_noise_are_in_the_state_and_epsilon_is_that_of_the_plain_run(start):
    """Three survive and two have the whole noise: (z clip)^2 3/2 / 3^2 in each number of the mean, within 5 sqrt(2 / n)."""
    quiet = start("fedavg", federation=ONE, privacy={**SHARED, "noise_multiplier": 0.0}, secure_aggregation=FINE).go()
    masked = start("fedavg", federation=ONE, privacy=SHARED, secure_aggregation=SECURE).go()
    noise = torch.cat([(masked.state[key].double() - quiet.state[key].double()).flatten() for key in sorted(masked.state)])
    expected = 0.01**2 * 3 / 2 / 3**2
    assert abs(float(noise.square().mean()) / expected - 1) < 5 * (2 / noise.numel()) ** 0.5
    plain = start("fedavg", federation=ONE, privacy=SHARED).go()
    told, usual = (Record.load(run.session.folder) for run in (masked, plain))
    spent = epsilon(noise_multiplier=1.0, rate=1.0, steps=1, delta=1e-5)
    assert told.rounds[-1]["privacy"] == usual.rounds[-1]["privacy"] == {"of": "clients", "epsilon": spent, "delta": 1e-5}
    assert told.further["privacy"] == usual.further["privacy"]


@pytest.mark.parametrize("method", ["flex", "fedadam"])
def test_what_the_coordinator_gets_in_a_run(start, method):
    """Masked leaves and the counts behind masks, no fact of anybody, no leaf of anybody's training, in either of two rounds."""
    run = start(method, federation={"rounds": 2}, privacy=SHARED, secure_aggregation=SECURE).go()
    asked = [question for question, _, _ in run.up]
    assert [asked.count(question) for question in (KEYS, SHARES, TRAIN, UNMASK)] == [6, 6, 6, 6]
    trained = [leaf for name in ROWS for leaf in run.memory(name).tree("trained").values()]
    told = {KEYS: {"public_keys"}, SHARES: {"sealed_shares", "commitment"}, TRAIN: {"masked_counts"}, UNMASK: {"opened_shares"}}
    for question, _, content in run.up:
        reply = Bundle.decode(content)
        assert set(reply.trees) == ({"masked"} if question == TRAIN else set())
        if question in told:
            assert set(reply.facts) == told[question]
        assert not any(raw_bytes(leaf) in content for leaf in trained)
    for line in Record.load(run.session.folder).rounds:
        assert (line["loss"], set(map(str, line["clients"].values()))) == (None, {"{}"})


@pytest.mark.parametrize("question", [TRAIN, UNMASK])
def test_a_client_that_drops_out_is_survived_and_divides_nothing(start, question):
    """Two of three remain, as many as have the whole noise; the divisor stays three. As in the plain run that lost the same reply."""
    quiet = {**SHARED, "noise_multiplier": 0.0}
    lost = lambda asked, number, client: (asked, client) == (question, "bo")  # noqa: E731
    run = start("fedavg", lost=lost, federation=ONE, privacy=quiet, secure_aggregation=FINE).go()
    lose = "" if question == UNMASK else "bo"
    plain = start("fedavg", lost=lambda asked, number, client: (asked, client) == ("train", lose), federation=ONE, privacy=quiet).go()
    within(run.state, plain.state, 2e-7)


@pytest.mark.parametrize("where", [{"where": "clients", "least": 3}, {"where": "server"}])
def test_a_round_that_lacks_noise_or_a_majority_changes_nothing_and_is_accounted_for(start, where):
    """With least: 3 one of three may not be lost; where the coordinator adds the noise, two may not, and it adds none to nothing."""
    gone = {"bo"} if "least" in where else {"ada", "bo"}
    lost = lambda question, number, client: (question, number) == (TRAIN, 1) and client in gone  # noqa: E731
    run = start("fedavg", lost=lost, federation={"rounds": 2}, privacy={**SHARED, **where}, secure_aggregation=SECURE)
    watch, states = Watch(), []
    run.session.progress = watch
    commit = run.session._commit
    run.session._commit = lambda **more: (states.append(run.session.server.state.digest()), commit(**more))  # type: ignore[method-assign]
    run.go()
    assert len(set(states)) == 2  # opened with, round 1 = round 2
    lines = [json.loads(line) for line in (run.session.folder / "rounds.jsonl").read_text().splitlines()]
    assert [bool(line.get("unopened")) for line in lines] == [False, True]
    assert lines[1]["privacy"]["epsilon"] == epsilon(noise_multiplier=1.0, rate=1.0, steps=2, delta=1e-5)


def test_the_first_screen_says_who_adds_the_noise(start):
    shown = {}
    for where in ({"where": "server"}, {"where": "clients", "least": 3}):
        run = start("fedavg", privacy={**SHARED, **where}, secure_aggregation=SECURE)
        secure, guarantee = run.session.secure, run.session.guarantee
        (_, shown[where["where"]]) = secure.plan(run.session.method.merge, 3, guarantee.rows, guarantee.contribution, run.session.shapes)[0]
    assert shown["server"].endswith("sums of at least 2 clients; 1 of 3 may drop out; the coordinator adds the noise to them")
    assert shown["clients"].endswith("sums of at least 3 clients; 0 of 3 may drop out; 3 shares are the whole noise")


def test_what_does_not_fit_is_refused_before_training(start):
    for privacy, secure, reason in (
        ({"least": 3}, {"threshold": 2}, "secure_aggregation.threshold: a sum of 2 clients would lack noise"),
        ({"clip": 1e-4}, {"quantisation_bits": 8}, "secure_aggregation.quantisation_bits: a step of 0.00079 is too coarse"),
        ({"clip": 1e4, "noise_multiplier": 3}, {}, "secure_aggregation.modulus_bits: sums of 3 clients"),
    ):
        with pytest.raises(ValueError, match=reason):
            start("fedavg", privacy={**SHARED, **privacy}, secure_aggregation={**SECURE, **secure})


def test_a_run_stopped_in_the_middle_ends_with_the_same_bits(place, tmp_path, monkeypatch):
    """In round 2, when all secrets are drawn, here the same in both runs for the comparison. Noise comes again under new masks."""
    recipe = place.recipe("fedavg", federation={"rounds": 2}, privacy={**SHARED, "secret": True}, secure_aggregation=SECURE)
    with monkeypatch.context() as same:
        same.setattr("fedgraft.transforms.noise.secrets.token_bytes", lambda length: bytes(range(length)))
        whole = runner.run(recipe, out=tmp_path / "whole", progress=Quiet())
        with pytest.raises(KeyboardInterrupt):
            runner.run(recipe, out=tmp_path / "stopped", progress=StopAt("training", 5))
    runner.resume(tmp_path / "stopped", progress=Quiet())
    assert (tmp_path / "stopped" / "digest.txt").read_text() == (whole.folder / "digest.txt").read_text()


def test_over_a_grid_it_is_the_run_in_process_with_the_same_secrets(place, tmp_path, grid_of, monkeypatch):
    """Sites tell no number of rows, and none is needed."""
    monkeypatch.setattr("fedgraft.transforms.noise.secrets.token_bytes", lambda length: b"s" * length)
    recipe = place.recipe("fedavg", **LEAN, privacy={**SHARED, "secret": True}, secure_aggregation=SECURE)
    here = runner.run(recipe, out=tmp_path / "here")
    afar = runner.run(flower(recipe), out=tmp_path / "afar", connect=reach.over(grid_of()))
    for path in [*(tmp_path / "sites").rglob(SECRET), *here.folder.rglob(SECRET)]:  # one beside each memory, which is no memory
        path.unlink()
    assert digests(afar.folder, tmp_path / "sites") == digests(here.folder)
    strip = lambda record: [{**line, "bytes_down": 0} for line in timeless(record)[0]]  # noqa: E731
    assert strip(afar) == strip(here)
    assert afar.further["privacy"] == here.further["privacy"]
    assert afar.further["privacy"]["seeded"] is False


def test_rows_under_dp_sgd_are_summed_under_masks_as_they_are(start):
    """The noise is each client's own and complete, so all that follows is post-processing; the mean within a step of the plain one."""
    private = {"privacy": {"name": "examples", "clip": 1.0, "noise_multiplier": 1.0, "delta": 0.01}}
    plain = start("fedavg", federation=ONE, **private).go()
    masked = start("fedavg", federation=ONE, **private, secure_aggregation={**SECURE, "clipping_range": 1.0}).go()
    within(masked.state, plain.state, SecAggPlus(clipping_range=1.0).step + 1e-7)
    told = [Record.load(run.session.folder) for run in (masked, plain)]
    assert told[0].further["privacy"] == told[1].further["privacy"]
    trained = [Bundle.decode(content).facts for question, _, content in masked.up if question == TRAIN]
    assert {frozenset(facts) for facts in trained} == {frozenset({"masked_counts"})}


def test_the_recipe_says_both(start):
    load_recipe({"method": {"name": "flex"}, "privacy": {**SHARED, "least": 3}, "secure_aggregation": SECURE})
    load_recipe(
        {"method": {"name": "flex"}, "privacy": {"name": "examples"}, "selection": {"text": "generic"}, "secure_aggregation": SECURE}
    )
