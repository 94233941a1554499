"""FLEx: what stays, what travels, where a graft comes from."""

from __future__ import annotations

import json

import pytest
import torch

from fedgraft.bundle import Bundle
from fedgraft.grafts.graft import GraftedModel
from fedgraft.moe.load import load_base
from fedgraft.selection.select import select_experts
from fedgraft.tree import combine, equal
from tests.methods.harness import ROWS


@pytest.fixture
def opened(start):
    """A run after selection, before the first round."""
    run = start("flex", graft={"train": "full"})
    run.session.folder.mkdir(parents=True)
    run.session._open()
    return run


def test_no_side_leaf_crosses_the_wire(start):
    """In neither direction, neither as an address nor anywhere in the bytes; nor does the server hold one."""
    run = start("flex", graft={"per_layer": 2}).go()
    assert {question for question, _, _ in run.down} == {question for question, _, _ in run.up} == {"graft", "train", "evaluate"}
    for _, _, content in run.down + run.up:
        assert b".side." not in content
        assert all(".attention." in key for tree in Bundle.decode(content).trees.values() for key in tree)
    assert b".side." not in (run.session.folder / "state" / "state.safetensors").read_bytes()
    sent = [content for question, _, content in run.up if question == "train"]
    assert len(sent) == 9
    assert all(b".attention." in content for content in sent)
    assert all(".side." in key for name in ROWS for key in run.memory(name).tree("personal"))  # where they are


def test_replies_hold_what_is_documented_and_nothing_more(start):
    run = start("flex", training={"optimizer_state": "kept"}).go()
    replies = {question: Bundle.decode(content) for question, _, content in run.up}
    assert {question: set(reply.trees) for question, reply in replies.items()} == {"graft": set(), "train": {"shared"}, "evaluate": set()}
    assert set(replies["graft"].facts) == {"experts", "errors", "calibration_tokens"}
    assert set(replies["train"].facts) == {"examples", "loss", "tokens", "seconds", "truncated"}
    assert set(run.memory("ada").trees) == {"personal", "trained", "moments.exp_avg", "moments.exp_avg_sq", "moments.step"}


def test_frozen_weights_stand(start):
    run = start("flex", graft={"train": "full"}, training={"checkpointing": True})
    before = run.session.reach.holdings.model.frozen_digest()
    run.go()
    assert run.session.reach.holdings.model.frozen_digest() == before
    fresh = GraftedModel(load_base(run.session.recipe.model), run.session.recipe.lora, run.session.recipe.graft)
    assert fresh.frozen_digest() == before


def test_grafts_are_copies_of_the_selected_experts(opened):
    """Of each client's own choice, which is that of selection run by hand on its own text."""
    model, chosen = opened.session.reach.holdings.model, {}
    for name in ROWS:
        client = opened.session.reach.holdings.open(name)
        choice = select_experts(model.base, client.calibration(), client.selection, 1, client.seed, name)
        chosen[name] = choice.experts
        memory = opened.memory(name)
        assert memory.facts == {"experts": choice.experts}
        tree = memory.tree("personal")
        for site, (expert,) in zip(model.base.sites, choice.experts, strict=True):
            head = f"layers.{site.layer}.side.0"
            gate, up = site.experts.gate_up_proj[expert].chunk(2)
            assert torch.equal(tree[f"{head}.mix.weight"], site.router.weight[expert])
            assert torch.equal(tree[f"{head}.expert.gate.weight"], gate)
            assert torch.equal(tree[f"{head}.expert.up.weight"], up)
            assert torch.equal(tree[f"{head}.expert.down.weight"], site.experts.down_proj[expert])
    assert len({str(experts) for experts in chosen.values()}) > 1


def test_selection_is_made_once_and_on_the_unmodified_model(start):
    run = start("flex").go()
    assert [client for question, client, _ in run.up if question == "graft"] == list(ROWS)
    first = {client: Bundle.decode(content).facts["experts"] for question, client, content in run.up if question == "graft"}
    assert {name: run.memory(name).facts["experts"] for name in ROWS} == first


def test_grafts_grow_apart(start):
    run = start("flex").go()
    trees = [run.memory(name).tree("personal") for name in ROWS]
    key = "layers.0.side.0.expert.down.B"
    assert all(tree[key].any() for tree in trees)
    assert len({tree[key].sum().item() for tree in trees}) == 3


def test_answers(start):
    """base: nothing; shared: the server's leaves; trained: as training left them; personal: own graft with the server's leaves."""
    run = start("flex", federation={"rounds": 2}).go()
    method, client = run.session.method, run.session.reach.holdings.open("bo")
    client.memory = run.memory("bo")
    answers = method.answer(method, client, method.pack(method, run.session.server, "bo"))
    assert list(answers) == ["base", "shared", "trained", "personal"]
    own, last = client.memory.tree("personal"), client.memory.tree("trained")
    assert (answers["base"].tree, answers["base"].experts) == ({}, [])
    assert equal(answers["shared"].tree, run.state)
    assert answers["shared"].experts == []
    assert equal(answers["trained"].tree, combine(last, own))
    assert equal(answers["personal"].tree, combine(run.state, own))
    assert answers["personal"].experts == answers["trained"].experts == client.experts
    assert not equal(last, run.state)
    sent = [content for question, name, content in run.up if (question, name) == ("train", "bo")]
    assert equal(Bundle.decode(sent[-1]).tree("shared"), last)


def test_bytes_are_those_of_the_attention_leaves_in_float32(start):
    """2 layers of q (32 -> 32), k and v (32 -> 16) at rank 4: 4 (64 + 48 + 48) = 640 numbers each, 5,120 bytes and a header."""
    run = start("flex", federation={"rounds": 1}).go()
    contents = [content for question, _, content in run.up + run.down if question == "train"]
    assert all(5120 < len(content) < 5120 + 2500 for content in contents)
    assert sum(leaf.numel() * 4 for leaf in run.state.values()) == 5120


def test_a_client_that_was_away_when_the_others_chose_grows_its_graft_when_it_first_trains(start):
    """Its own ask 0 never happened; what it then has is what it would have had."""
    whole, run = start("flex").go(), start("flex")
    engine = run.session.engine
    ask = engine.ask
    engine.ask = lambda question, packages: ask(question, {name: p for name, p in packages.items() if (question, name) != ("graft", "bo")})
    run.go()
    assert run.memory("bo").facts["experts"] == whole.memory("bo").facts["experts"]
    assert run.digest == whole.digest


def test_cut_rows_are_counted(start):
    """Every row takes more than 34 tokens of one byte each (the markers alone are 29), none more than 1,000."""
    for longest, cut in ((34, 4), (1000, 0)):
        run = start("flex", data={"max_length": longest}, clients=("ada", "bo")).go()
        lines = (run.session.folder / "rounds.jsonl").read_text().splitlines()
        assert [client["truncated"] for line in lines for client in json.loads(line)["clients"].values()] == [cut] * 6
