"""Whole runs under client-level privacy: identities, the record, resuming, secrets, refusals."""

from __future__ import annotations

import json

import pytest

from fedgraft import plugins
from fedgraft.bundle import Bundle
from fedgraft.recipe import load_recipe
from fedgraft.report.html import comparison_page, run_page
from fedgraft.report.progress import Lines, Quiet
from fedgraft.report.record import Record
from fedgraft.report.table import cost
from fedgraft.runner import resume
from fedgraft.runner import run as run_recipe
from fedgraft.transforms.accountant import epsilon
from fedgraft.transforms.noise import SECRET
from fedgraft.tree import equal
from fedgraft.use.export.export import export
from tests.contract.test_methods import StopAt
from tests.methods.harness import ROWS

pytest.importorskip("opacus", reason="extra privacy")

NOISED = {"name": "client", "clip": 0.01, "noise_multiplier": 1.0}
BEARS = {
    "apfl", "ditto", "fedadagrad", "fedadam", "fedavg", "fedavg_ft", "fedavgm", "feddpa", "fdlora", "fedper", "fedprox", "fedrep",
    "fedsa_lora", "fedyogi", "ffa_lora", "flex", "pfedme",
}  # fmt: skip
TWO = ("ada", "bo")
SECURE = {"secure_aggregation": {"name": "secagg_plus"}}


def refuses(recipe, reason):
    with pytest.raises(ValueError, match=reason):
        load_recipe(recipe)


@pytest.mark.parametrize("method", plugins.names("method"))
def test_each_method_bears_it_or_is_refused_with_a_reason(method):
    recipe = {"method": {"name": method}, "privacy": {"name": "client"}}
    if method in BEARS:
        load_recipe(recipe)
    else:
        refuses(recipe, rf"privacy.name: ('client' noises|method '{method}' sends something else)")


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"federation": {"merge": {"rule": "median"}}}, "privacy.name: .* 'median' answers to one client in other ways"),
        ({"federation": {"merge": {"rule": "norm_bounded"}}}, "privacy.name: .* 'norm_bounded'"),
        ({"method": {"name": "flex", "shared_graft": True}}, "privacy.name: .* learns of the clients' choices"),
        ({"engine": {"keep_replies": True}}, "privacy.name: engine.keep_replies"),
        ({"engine": {"name": "flower"}, "privacy": {"secret": False}}, "privacy.secret: sites elsewhere know the recipe"),
        ({"privacy": {"clip": None}}, "privacy.clip: noise is measured in units"),
        ({"privacy": {"clip": None, "noise_multiplier": 0, "quantile": 0.5}}, "privacy.quantile: the clip follows"),
        ({"engine": {"name": "flower"}, "evaluation": {"unseen": {"clients": 1}}}, "privacy.name: evaluation.unseen"),
        ({**SECURE, "privacy": {"clip": None, "noise_multiplier": 0}}, "privacy.clip: secure_aggregation sums numbers that have a bound"),
        ({**SECURE, "privacy": {"quantile": 0.5}}, "privacy.quantile: the whole numbers"),
        (
            {**SECURE, "federation": {"sampling": "poisson"}},
            "privacy.name: whether secure_aggregation opens .* federation.sampling to fixed",
        ),
        ({"privacy": {"where": "clients"}}, "privacy.least: with where: clients say"),
        ({"privacy": {"where": "clients", "least": 2}, "compression": {"name": "bf16"}}, "privacy.where: coded shares"),
        ({"privacy": {"where": "clients", "least": 2}, "federation": {"sampling": "poisson"}}, "privacy.where: the coordinator knows"),
        ({"privacy": {"where": "clients", "least": 2, "quantile": 0.5}}, "privacy.quantile: the count"),
    ],
)
def test_what_would_void_the_guarantee_is_refused(sections, reason):
    privacy = {"name": "client", **sections.get("privacy", {})}
    refuses({"method": {"name": "flex"}, **sections, "privacy": privacy}, reason)


def test_without_clip_and_noise_personal_leaves_and_replies_are_as_without(start):
    """Round 1, where all start alike: replies hold the same leaves; with equal numbers of rows the merges are the same bits."""
    usual = start("flex", federation={"rounds": 1}).go()
    run = start("flex", federation={"rounds": 1}, privacy={"name": "client", "clip": None, "noise_multiplier": 0}).go()
    for name in ROWS:
        assert equal(run.memory(name).tree("personal"), usual.memory(name).tree("personal"))
    sent, told = ([Bundle.decode(content) for question, _, content in one.up if question == "train"] for one in (usual, run))
    assert all(equal(left.tree("shared"), right.tree("shared")) for left, right in zip(sent, told, strict=True))
    line = json.loads((run.session.folder / "rounds.jsonl").read_text())
    assert line["privacy"] == {"of": "clients", "epsilon": None, "delta": 1e-5}


@pytest.mark.parametrize("method", ["flex", "ditto", "fedper", "fedadam"])
def test_noise_is_on_shared_leaves_alone_and_replies_tell_nothing_but_leaves(start, method):
    """The personal leaves of the first round are those of a run without; what goes up are the shared leaves and no fact."""
    usual = start(method, federation={"rounds": 1}).go()
    run = start(method, federation={"rounds": 1}, privacy=NOISED).go()
    assert not equal(run.state, usual.state)
    for name in ROWS:
        assert equal(run.memory(name).tree("personal"), usual.memory(name).tree("personal"))
    for question, _, content in run.up:
        reply = Bundle.decode(content)
        if question in {"train", "graft", "finish"}:
            assert reply.facts == {}
            assert set(reply.tree("shared")) == (set(run.state) if question == "train" else set())


def test_the_record_says_what_is_spent_and_bears_what_is_not_told(start):
    """Epsilon after each round is the accountant's; poisson with 2 of 3 on average has rate 2/3; the page has the line and no curve."""
    run = start("flex", federation={"clients_per_round": 2, "sampling": "poisson"}, privacy={**NOISED, "noise_multiplier": 2.0}).go()
    record = Record.load(run.session.folder)
    for line in record.rounds:
        spent = epsilon(noise_multiplier=2.0, rate=2 / 3, steps=line["round"] + 1, delta=1e-5)
        assert line["privacy"] == {"of": "clients", "epsilon": spent, "delta": 1e-5}
        assert line["loss"] is None
        assert line["tokens"] in {None, 0}
        assert all(facts == {} for facts in line["clients"].values())
    assert record.further["privacy"] == {
        **record.rounds[-1]["privacy"],
        "rounds": 3,
        "noise_multiplier": 2.0,
        "rate": 2 / 3,
        "seeded": True,
    }
    page = run_page(record)
    assert f"epsilon {spent:.3g} at delta 1e-05 for clients" in page
    assert "clients do not tell their losses" in page
    assert not record.selection


def test_epsilon_is_shown_with_every_reply_of_training_and_with_the_tables(place, tmp_path):
    shown = []
    recipe = place.recipe("fedavg", clients=TWO, federation={"rounds": 2}, privacy=NOISED)
    record = run_recipe(recipe, out=tmp_path / "run", progress=Lines(shown.append, verbose=True))
    for number in (1, 2):
        spent = epsilon(noise_multiplier=1.0, rate=1.0, steps=number, delta=1e-5)
        assert sum(f"round {number}  " in line and line.endswith(f"epsilon {spent:.3g}") for line in shown) == 2
    assert cost(record)["training_tokens"] is None
    assert "–" in comparison_page([record])


def test_fixed_samples_are_accounted_for_as_if_everybody_was_in_every_round(start):
    run = start("fedavg", federation={"clients_per_round": 2}, privacy=NOISED)
    told = dict(run.session.guarantee.lines())["privacy"]
    spent = epsilon(noise_multiplier=1.0, rate=1.0, steps=3, delta=1e-5)
    assert told.startswith(f"epsilon {spent:.3g} at delta 1e-05 for clients, after 3 rounds, in every one; noise from the recipe's seed")


@pytest.mark.parametrize(
    "privacy",
    [
        {**NOISED, "quantile": 0.5},
        {**NOISED, "secret": True},
        {**NOISED, "where": "clients", "least": 2, "secret": True},
    ],
    ids=["adaptive", "secret", "shares"],
)
def test_a_resumed_run_is_the_same_bit_for_bit(place, tmp_path, privacy, monkeypatch):
    """Stopped inside a round, when all secrets are drawn, here the same in both for the comparison; the resumed run finds them again."""
    monkeypatch.setattr("fedgraft.transforms.noise.secrets.token_bytes", lambda count: bytes(range(count)))
    sampling = {} if "where" in privacy else {"clients_per_round": 2, "sampling": "poisson"}
    recipe = place.recipe("flex", federation=sampling, privacy=privacy)
    whole = run_recipe(recipe, out=tmp_path / "whole", progress=Quiet())
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, out=tmp_path / "stopped", progress=StopAt("training", 2 if sampling else 5))
    monkeypatch.undo()
    resume(tmp_path / "stopped", progress=Quiet())
    assert (tmp_path / "stopped" / "digest.txt").read_text() == (whole.folder / "digest.txt").read_text()
    clips = [line["privacy"].get("clip") for line in Record.load(whole.folder).rounds]
    assert len(set(clips)) == (len(clips) if "quantile" in privacy else 1)


def test_a_secret_is_in_no_file_that_is_shown_and_makes_another_run_of_the_same_recipe(place, tmp_path):
    recipe = place.recipe("fedavg", clients=TWO, federation={"rounds": 1}, privacy={**NOISED, "secret": True})
    first, second = (run_recipe(recipe, out=tmp_path / name, progress=Quiet()) for name in ("first", "second"))
    assert first.digest != second.digest
    own = (first.folder / SECRET).read_text().strip()
    assert len(own) == 64
    for path in first.folder.rglob("*"):
        if path.is_file() and path.name != SECRET:
            assert own.encode() not in path.read_bytes()
    assert first.further["privacy"]["seeded"] is False
    (first.folder / SECRET).unlink()
    with pytest.raises(ValueError, match=r"noise\.key: missing"):
        resume(first.folder, rounds=2, progress=Quiet())


def test_seeded_noise_is_the_same_run_again(place, tmp_path):
    recipe = place.recipe("fedavg", clients=TWO, federation={"rounds": 1}, privacy=NOISED)
    first, second = (run_recipe(recipe, out=tmp_path / name, progress=Quiet()) for name in ("first", "second"))
    assert first.digest == second.digest
    assert not (first.folder / SECRET).exists()


def test_the_card_of_an_exported_model_says_what_was_spent(place, tmp_path):
    run_recipe(place.recipe("fedavg", clients=TWO, federation={"rounds": 2}, privacy=NOISED), out=tmp_path / "run", progress=Quiet())
    export(tmp_path / "run", "shared", "fedgraft", tmp_path / "out")
    spent = epsilon(noise_multiplier=1.0, rate=1.0, steps=2, delta=1e-5)
    card = " ".join((tmp_path / "out" / "README.md").read_text(encoding="utf-8").split())
    assert f"Privacy spent in 2 rounds on the leaves that were shared: epsilon {spent:.3g} at delta 1e-05 for clients" in card


def test_int8_under_a_clip_runs(start):
    """Clip, compress; the coordinator clips what it has decoded and adds noise."""
    run = start("flex", privacy=NOISED, compression={"name": "int8"}).go()
    assert Record.load(run.session.folder).finished
