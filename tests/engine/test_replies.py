"""Replies that decode and are not what was due, method by method: lost by name, in process and over a grid, and the round goes on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedgraft import files, reach, runner
from fedgraft.bundle import Bundle
from tests.engine.conftest import Node
from tests.engine.test_flower import Watch, flower


def scaled(tree, key):
    return {**tree, key: tree[key] * math.nan}


CHANGES = {
    "lacks": lambda tree, key: {other: leaf for other, leaf in tree.items() if other != key},
    "more": lambda tree, key: {**tree, key.replace("layers.0", "layers.9"): tree[key]},
    "longer": lambda tree, key: {**tree, key: torch.cat([tree[key], tree[key]])},
    "NaN": scaled,
}
CASES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "scaffold": {},
    "hetlora": {"options": {"ranks": [4, 2, 3], "decay": 0.5, "strength": 5.0}},
    "flora": {"options": {"ranks": [4, 2, 3]}},
    "fedex_lora": {},
    "fedsa_lora": {},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("case", "name"), [*((case, "shared") for case in CASES), ("scaffold", "control")])
def test_a_changed_reply_is_lost_by_name_and_the_round_goes_on(start, case, name, change):
    """The state is that of a run in which the reply never came."""
    sections = {"federation": {"rounds": 2}, **CASES[case]}
    other = start(case, lost=lambda question, number, client: (question, number, client) == ("train", 1, "bo"), **sections)
    run = start(case, **sections)
    questions = run.session.engine.site.questions

    def changed(client, package):
        reply = questions["train"](client, package)
        if client.name != "bo" or package.facts["round"] != 1:
            return reply
        tree = reply.tree(name)
        return Bundle(trees={**reply.trees, name: CHANGES[change](tree, min(tree))}, facts=reply.facts)

    run.session.engine.site.questions = {**questions, "train": changed}
    run.go()
    (line,) = [line for line in files.read_lines(run.session.folder / "rounds.jsonl") if "failed" in line]
    assert (line["round"], sorted(line["clients"]), line["failed"].keys()) == (1, ["ada", "cy"], {"bo"})
    assert f"of {name!r} " in line["failed"]["bo"]
    assert run.session.server.state.digest() == other.go().session.server.state.digest()


def test_pruned_ranks_are_no_fault(start):
    """HetLoRA's clients drop ranks by themselves, here half of them in a round."""
    run = start("hetlora", **CASES["hetlora"]).go()
    assert run.session.failures == {}
    assert min(run.session.server.state.facts["ranks"].values()) < 2


def altered(grid, node, question, change, facts=lambda facts: facts):
    """A node whose replies to a question are sound messages with something else inside."""
    app = grid.nodes[node].app

    def answer(message, context):
        from flwr.app import Message

        from fedgraft.engine.wire import Frame

        asked, response = Frame.of_records(message.content), app(message, context)
        if asked.facts.get("question") != question:
            return response
        frame = Frame.of_records(response.content)
        content = change(Bundle.decode(frame.content)).encode()
        return Message(Frame(kind="reply", facts=facts(frame.facts), content=content).records(), reply_to=message)

    grid.nodes[node] = Node(answer, grid.nodes[node].partition)
    return grid


def test_over_a_grid_too(place, tmp_path, grid_of):
    watch, grid = Watch(), altered(grid_of(), 101, "train", lambda bundle: Bundle(facts=bundle.facts))
    recipe = flower(place.recipe("fedavg", federation={"rounds": 2}))
    record = runner.run(recipe, out=tmp_path / "run", progress=watch, connect=reach.over(grid))
    reason = "the reply of client 'bo' can't be used: leaf 'layers.0.attention.k.A' of 'shared' is missing"
    assert [line["failed"] for line in record.rounds] == [{"bo": reason}] * 2
    assert [sorted(line["clients"]) for line in record.rounds] == [["ada", "cy"]] * 2
    assert watch.warnings == [f"{reason}. It is left out here; its own state is kept on its side"] * 2


def replaying(facts):
    """The first reply's echo in all later ones, as when an old message is sent again."""
    KEPT.setdefault("first", facts)
    return KEPT["first"]


KEPT: dict[str, Any] = {}


def test_an_old_reply_that_is_sent_again_is_lost_by_name(place, tmp_path, grid_of):
    """The round in which it was new keeps it; over a grid a second reply to one message is never pulled."""
    KEPT.clear()
    watch, grid = Watch(), altered(grid_of(), 101, "train", lambda bundle: bundle, replaying)
    recipe = flower(place.recipe("fedavg", federation={"rounds": 2}))
    record = runner.run(recipe, out=tmp_path / "run", progress=watch, connect=reach.over(grid))
    assert [sorted(line["clients"]) for line in record.rounds] == [["ada", "bo", "cy"], ["ada", "cy"]]
    assert record.rounds[1]["failed"] == {
        "bo": "client 'bo': a reply to another request than this one; an old one may have been sent again"
    }


def test_a_second_reply_to_one_message_counts_for_nothing(place, tmp_path, grid_of):
    recipe = flower(place.recipe("fedavg", federation={"rounds": 1}))
    once = runner.run(recipe, out=tmp_path / "once", connect=reach.over(grid_of()))
    grid = grid_of(folder=tmp_path / "others")
    pull = grid.pull_messages
    grid.pull_messages = lambda numbers: [message for message in pull(numbers) for _ in range(2)]
    twice = runner.run(recipe, out=tmp_path / "twice", connect=reach.over(grid))
    assert state_of(twice) == state_of(once)
    assert [list(line["clients"]) for line in twice.rounds] == [["ada", "bo", "cy"]]


@pytest.mark.parametrize("fact", ["run", "client", "question", "asked"])
def test_a_reply_says_what_it_answers(place, tmp_path, grid_of, fact):
    grid = altered(grid_of(), 101, "train", lambda bundle: bundle, lambda facts: {**facts, fact: "other"})
    record = runner.run(flower(place.recipe("fedavg", federation={"rounds": 1})), out=tmp_path / "run", connect=reach.over(grid))
    assert list(record.rounds[0]["failed"]) == ["bo"]


def saying(grid, node, kind, facts):
    """A node that answers every training question with this."""
    app = grid.nodes[node].app

    def answer(message, context):
        from flwr.app import Message

        from fedgraft.engine.wire import Frame

        asked = Frame.of_records(message.content).facts.get("question") == "train" or kind == "card"
        return Message(Frame(kind=kind, facts=facts).records(), reply_to=message) if asked else app(message, context)

    grid.nodes[node] = Node(answer, grid.nodes[node].partition)
    return grid


@pytest.mark.parametrize("kind", ["failed", "refused"])
@pytest.mark.parametrize(
    ("facts", "shown"), [({}, "no reason given"), ({"reason": "\x1b[2Jfull\x07"}, "?[2Jfull?"), ({"reason": ["x" * 5000]}, "x" * 1990)]
)
def test_a_reason_is_shown_and_cannot_do_more(place, tmp_path, grid_of, kind, facts, shown):
    """Neither escapes of a terminal nor length, and none at all is no bug."""
    recipe = flower(place.recipe("fedavg", federation={"rounds": 1}))
    record = runner.run(recipe, out=tmp_path / "run", connect=reach.over(saying(grid_of(), 101, kind, facts)))
    assert shown in record.rounds[0]["failed"]["bo"]
    assert len(record.rounds[0]["failed"]["bo"]) < 2100


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (None, "a client's card is not one"),
        ({"name": "../../bo", "rows": {"train": 1, "validation": 1, "test": 1}}, "name '../../bo' cannot be that of a folder"),
        ({"name": "bo", "rows": {"train": 1}}, "its rows are not numbers for train, validation, test"),
        ({"name": "bo", "rows": {"train": "x"}}, "rows.train"),
    ],
)
def test_a_card_that_is_none_is_told_and_the_others_begin(place, tmp_path, grid_of, card, said):
    full = card and {"categories": {}, "data_digest": "", "base_digest": "", **card}
    watch, recipe = Watch(), flower(place.recipe("fedavg", federation={"rounds": 1}), clients=2)
    runner.run(recipe, out=tmp_path / "run", progress=watch, connect=reach.over(saying(grid_of(), 101, "card", {"card": full})))
    assert any("node 101 cannot take part" in warning and said in warning for warning in watch.warnings)


@pytest.mark.parametrize(
    ("case", "sections", "question"),
    [("flex", {"options": {"shared_graft": True}}, "graft"), ("fedavg", {"lora": {"targets": ["q", "router"]}}, "router")],
)
def test_first_leaves_that_cannot_be_used_come_from_the_next_client(place, tmp_path, grid_of, case, sections, question):
    """All clients have the same ones, so the run ends as if nothing had been wrong."""
    recipe, watch = flower(place.recipe(case, federation={"rounds": 1}, **sections)), Watch()

    def broken(bundle):
        trees = {name: {key: leaf * math.nan for key, leaf in tree.items()} for name, tree in bundle.trees.items()}
        return Bundle(trees=trees, facts=bundle.facts)

    sound = runner.run(recipe, out=tmp_path / "sound", connect=reach.over(grid_of()))
    grid = altered(grid_of(), 100, question, broken)
    run = runner.run(recipe, out=tmp_path / "run", progress=watch, connect=reach.over(grid))
    assert state_of(run) == state_of(sound)
    (warning,) = watch.warnings
    assert warning.startswith("the reply of client 'ada' can't be used: leaf 'layers.0.")


def test_who_tells_of_other_layers_than_the_others_has_no_vote(place, tmp_path, grid_of):
    """The shared graft's expert is elected by the others, and the run goes on."""
    recipe = flower(place.recipe("flex", options={"shared_graft": True}, federation={"rounds": 1}))

    def shorter(bundle):
        return Bundle(trees=bundle.trees, facts={**bundle.facts, "experts": [[7]]})

    record = runner.run(recipe, out=tmp_path / "run", connect=reach.over(altered(grid_of(), 100, "graft", shorter)))
    assert len(record.rounds) == 1
    assert len(Bundle.load(record.folder / "state" / "state.safetensors").facts["common"]) == 2


def state_of(record):
    return Bundle.load(record.folder / "state" / "state.safetensors").digest()
