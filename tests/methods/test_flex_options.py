"""FLEx's ablations as whole runs: what is trained, what stays, what travels."""

from __future__ import annotations

import pytest
import torch

from fedgraft.bundle import Bundle
from fedgraft.methods.flex import elect
from fedgraft.recipe import load_recipe
from fedgraft.report.progress import Quiet
from fedgraft.report.record import Record
from fedgraft.runner import resume
from fedgraft.runner import run as run_recipe
from fedgraft.selection.profile import measure
from fedgraft.tree import digest, equal
from tests.methods.harness import ROWS, open_run

SHARED = {"shared_graft": True}


@pytest.fixture
def start(place, tmp_path_factory):
    """`start(options of flex, **recipe sections)`: a run that is opened but not begun."""

    def build(options=None, **sections):
        recipe = place.recipe("flex", **sections)
        recipe["method"] |= options or {}
        return open_run(recipe, tmp_path_factory.mktemp("run") / "flex")

    return build


def trained(run, name: str = "ada") -> set[str]:
    """Addresses of everything a client trains."""
    memory = run.memory(name)
    return memory.tree("personal").keys() | memory.tree("trained").keys()


@pytest.mark.parametrize(
    ("graft", "mix"),
    [
        ({}, True),
        ({"gate": "fixed"}, False),
        ({"gate": "off"}, False),
        ({"form": "in_place"}, False),
        ({"train": "full", "mixture": 2}, True),
    ],
    ids=str,
)
def test_every_form_trains_its_leaves_and_only_a_learned_gate_is_one(start, graft, mix):
    run = start(graft=graft, evaluation={"models": ["base", "personal"]}).go()
    keys = trained(run)
    assert any(".side.0.expert." in key for key in keys)
    assert any(".mix." in key for key in keys) == mix
    moved = run.memory("ada").tree("personal")
    client = run.session.reach.holdings.open("ada")
    client.memory = run.memory("ada")
    fresh = run.session.reach.holdings.model.fresh_side(client.experts, client.seed, client.mixture)
    assert fresh.keys() == moved.keys()
    still = [key for key in moved if torch.equal(moved[key], fresh[key])]
    assert not still or graft.get("form") == "in_place"  # there an expert may have met no token
    assert len(still) < len(moved)
    assert Record.load(run.session.folder).results["ada"]["personal"]["gate_mean"]


def test_a_mixture_is_that_of_the_criterion(start):
    """Two experts by gate mass, in proportion to it; from each client's own text."""
    run = start(graft={"train": "full", "mixture": 2}, selection={"criterion": "gate_mass"}, federation={"rounds": 0}).go()
    facts = run.memory("bo").facts
    for (best,), parts in zip(facts["experts"], facts["mixture"], strict=True):
        assert parts[0][0] == best
        assert sum(share for _, share in parts) == pytest.approx(1)
        assert parts[0][1] >= parts[1][1] > 0


def test_in_place_starts_as_the_base(start):
    run = start(graft={"form": "in_place"}, federation={"rounds": 0}, evaluation={"models": ["base", "personal"]}).go()
    for models in Record.load(run.session.folder).results.values():
        assert models["personal"]["loss"] == pytest.approx(models["base"]["loss"], abs=1e-5)


def test_the_shared_graft_is_the_same_for_all_and_the_own_one_stays(start):
    run = start(SHARED, graft={"train": "full"}).go()
    shared, own = ({key for key in run.state if ".side." in key}, run.memory("ada").tree("personal").keys())
    assert {key.split(".")[3] for key in shared} == {"0"}
    assert {key.split(".")[3] for key in own} == {"1"}
    for _, _, content in run.up + run.down:
        assert b".side.1." not in content
    packages = {name: Bundle.decode(content) for question, name, content in run.down if question == "evaluate"}
    assert len({digest(package.tree("shared")) for package in packages.values()}) == 1
    experts = {name: run.memory(name).facts["experts"] for name in ROWS}
    assert len({str([layer[0] for layer in chosen]) for chosen in experts.values()}) == 1
    assert all(len(layer) == 2 for chosen in experts.values() for layer in chosen)


def test_the_shared_graft_starts_from_the_elected_expert(start):
    run = start(SHARED, graft={"train": "full"}, federation={"rounds": 0}).go()
    replies = [Bundle.decode(content) for question, _, content in run.up if question == "graft"]
    assert len(replies) == len(ROWS) + 1  # one of them sends the first leaves
    common = elect([reply.facts["experts"] for reply in replies[: len(ROWS)]])
    assert run.session.server.state.facts["common"] == common
    for site, expert in zip(run.session.reach.holdings.model.base.sites, common, strict=True):
        assert torch.equal(run.state[f"layers.{site.layer}.side.0.expert.down.weight"], site.experts.down_proj[expert])
    assert Record.load(run.session.folder).selection["ada"]["errors"]


def test_the_shared_graft_is_averaged_over_examples(start):
    run = start(SHARED, federation={"rounds": 1}).go()
    replies = {name: Bundle.decode(content) for question, name, content in run.up if question == "train"}
    key = "layers.1.side.0.expert.up.B"
    expected = sum(replies[name].tree("shared")[key].double() * rows for name, rows in ROWS.items()) / sum(ROWS.values())
    torch.testing.assert_close(run.state[key].double(), expected, rtol=0, atol=1e-7)


def test_majority_wins_and_ties_go_to_the_lowest():
    assert elect([[[3, 1], [5, 0]], [[3, 2], [4, 0]], [[1, 3], [6, 4]]]) == [3, 4]


@pytest.mark.parametrize("away", [("bo",), ("ada", "cy")])
def test_clients_that_were_away_when_the_others_chose_join_later(start, away):
    run = start(SHARED)
    engine, ask = run.session.engine, run.session.engine.ask
    engine.ask = lambda question, packages: ask(
        question, {name: package for name, package in packages.items() if question != "graft" or name not in away}
    )
    run.go()
    assert {str([layer[0] for layer in run.memory(name).facts["experts"]]) for name in ROWS} == {
        str(run.session.server.state.facts["common"])
    }


def test_a_client_that_never_trained_is_evaluated_and_keeps_no_trace(start):
    """One of three a round, one round: the other two have chosen but never joined."""
    run = start(SHARED, federation={"rounds": 1, "clients_per_round": 1}, evaluation={"models": ["shared", "personal"]}).go()
    results = Record.load(run.session.folder).results
    assert results.keys() == ROWS.keys()
    assert all(models.keys() == {"shared", "personal"} for models in results.values())
    before = {name: run.memory(name).encode() for name in ROWS}
    run.session._evaluate()
    assert {name: run.memory(name).encode() for name in ROWS} == before
    engine = run.session.engine
    assert all(max(engine.store.versions(name)) <= engine.asked for name in ROWS)  # no file of a memory that evaluation made


@pytest.mark.parametrize("graft", [{"per_layer": 2}, {"train": "full", "mixture": 2}, {"form": "in_place"}, {"gate": "off"}], ids=str)
def test_the_shared_graft_goes_with_every_form(start, graft):
    run = start(SHARED, graft=graft).go()
    grafts = graft.get("per_layer", 1)
    assert {key.split(".")[3] for key in run.memory("cy").tree("personal")} == {str(number) for number in range(1, grafts + 1)}
    assert run.session.account.grafts == grafts + 1
    assert run.session.account.shared.total == sum(leaf.numel() for leaf in run.state.values())
    assert run.session.account.personal.total == sum(leaf.numel() for leaf in run.memory("cy").tree("personal").values())


class StopAt(Quiet):
    """Interrupts at the given step of a phase."""

    def __init__(self, phase, step):
        self.at, self.phase, self.left = phase, "", step

    def begin(self, phase, total):
        self.phase = phase

    def step(self, note=""):
        self.left -= self.phase == self.at
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", [SHARED, {"private_router": True}, {"shared_graft": True, "private_router": True}], ids=str)
def test_interrupted_and_resumed_is_uninterrupted(place, tmp_path, method):
    recipe = place.recipe("flex", lora={"targets": ["q", "router"]}, training={"optimizer_state": "kept"})
    recipe["method"] |= method
    whole = run_recipe(recipe, out=tmp_path / "whole")
    for phase, step in (("selection", 2), ("training", 2), ("training", 4)):
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, out=tmp_path / f"{phase}{step}", progress=StopAt(phase, step))
        assert resume(tmp_path / f"{phase}{step}").digest == whole.digest


def test_a_private_router_stays(start):
    run = start({"private_router": True}, lora={"targets": ["q", "router"]}).go()
    rows = [run.memory(name).tree("personal")["layers.0.router.weight"] for name in ROWS]
    assert not any(torch.equal(one, other) for one, other in [(rows[0], rows[1]), (rows[1], rows[2])])
    assert not torch.equal(rows[0], run.session.reach.holdings.model.base.sites[0].router.weight)
    for _, _, content in run.up + run.down:
        assert b".router." not in content
    both = start(lora={"targets": ["q", "router"]}).go()
    assert "layers.0.router.weight" in both.state  # without the option it is shared


def test_a_private_router_must_be_a_target():
    with pytest.raises(ValueError, match=r"lora.targets: method 'flex' with these options needs 'router' there"):
        load_recipe({"method": {"name": "flex", "private_router": True}})


def test_generic_text_gives_every_client_the_same_choice(start):
    own, generic = (start(selection={"text": text, "tokens": 200}, federation={"rounds": 0}).go() for text in ("own", "generic"))
    assert len({str(generic.memory(name).facts["experts"]) for name in ROWS}) == 1
    assert len({str(own.memory(name).facts["experts"]) for name in ROWS}) > 1


def test_generic_text_is_measured_once_for_all_clients(start, monkeypatch):
    calls = []
    monkeypatch.setattr("fedgraft.selection.select.measure", lambda *args, **options: calls.append(args) or measure(*args, **options))
    start(selection={"text": "generic", "tokens": 200}, federation={"rounds": 0}).go()
    assert len(calls) == 1
    start(selection={"text": "own", "tokens": 200}, federation={"rounds": 0}).go()
    assert len(calls) == 1 + len(ROWS)


def test_without_options_nothing_has_changed(start):
    """Spelt out or not, the options' defaults are the same run."""
    plain = start().go()
    spelt = start({"shared_graft": False, "private_router": False}, graft={"gate": "learned", "mixture": 1}).go()
    assert plain.digest == spelt.digest
    assert equal(plain.state, spelt.state)
