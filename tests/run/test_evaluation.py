"""Evaluation of whole runs: what is written, other clients' models, unseen clients, and rows that nobody may see."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from fedgraft.bundle import Bundle
from fedgraft.evaluation.cross import check_cross
from fedgraft.evaluation.personal import measure
from fedgraft.evaluation.settings import EvaluationSettings
from fedgraft.hosting import Holdings
from fedgraft.methods.method import Prediction
from fedgraft.recipe import load_recipe
from fedgraft.report.progress import Quiet
from fedgraft.report.record import Record
from fedgraft.report.table import further_tables
from fedgraft.runner import resume, run
from fedgraft.session import Session
from fedgraft.tree import equal

LEAN = {"federation": {"rounds": 2}, "training": {"steps": 1, "lr": 1e-2, "lr_min": 1e-3}}
QUICK = {"rows": None, "batch_size": 2, "generate": False, "knowledge_tokens": 0}
UNSEEN = {"clients": ["garden"], "rows": [0, 3, 5], "rounds": 2}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A FLEx run with everything measured that is not by default."""
    return run(world.recipe(**LEAN, evaluation={**QUICK, "cross": True, "unseen": UNSEEN}), out=tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def session(world, tmp_path):
    """`session(**sections)`: one that is not begun."""
    return lambda **sections: Session(load_recipe(world.recipe(**{**LEAN, **sections})), tmp_path / "run", Quiet())


def test_results_hold_every_part_and_rows_lie_beside(whole):
    document = json.loads((whole.folder / "results.json").read_text())
    assert list(document) == ["schema", "rounds", "split", "clients", "experts", "unseen", "cross", "summary"]
    assert (document["split"], whole.split) == ("test", "test")
    assert set(document["clients"]) == set(document["experts"]) == {"bakery", "harbour"}
    assert whole.further.keys() == {"experts", "unseen", "cross", "summary"}
    assert sorted(path.name for path in (whole.folder / "evaluation").iterdir()) == ["bakery.jsonl", "harbour.jsonl"]
    lines = [json.loads(line) for line in (whole.folder / "evaluation" / "bakery.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["model"] == "personal"]
    assert len(own) == 3
    loss = sum(line["nats"] for line in own) / sum(line["tokens"] for line in own)
    assert loss == pytest.approx(whole.results["bakery"]["personal"]["loss"], rel=1e-12)


def test_the_matrix_is_everybodys_model_on_everybodys_rows(whole, session):
    """On the diagonal it is the personal loss; elsewhere the leaves of the owner's memory with the shared ones, on other rows."""
    cross = whole.further["cross"]
    for client in ("bakery", "harbour"):
        assert cross[client][client] == pytest.approx(whole.results[client]["personal"]["loss"], rel=1e-6)
    again = Session(load_recipe(whole.folder / "recipe.yaml"), whole.folder, Quiet())
    again.restore()
    memory, shared = again.engine.store.load("bakery", again.engine.asked), again.server.state.tree("shared")
    model = Prediction(tree={**shared, **memory.tree("personal")}, experts=memory.facts["experts"])
    harbour = again.reach.holdings.open("harbour")
    settings = again.recipe.evaluation
    wanted = measure(harbour, {"personal": model}, harbour.data.test, settings)[0]["personal"]["loss"]
    assert cross["harbour"]["bakery"] == pytest.approx(wanted, rel=1e-6)
    assert len({loss for losses in cross.values() for loss in losses.values()}) == 4
    table = further_tables(whole)[0]
    assert (table.figure, table.columns, table.clients) == ("cross", ["bakery", "harbour"], cross)


def test_personal_leaves_are_lent_only_where_the_recipe_says_so_and_never_between_sites(session, world, tmp_path):
    opened = session(evaluation=QUICK)
    assert not {"lend", "borrow"} & set(opened.engine.site.questions)
    lending = load_recipe(world.recipe(evaluation={"cross": True}))
    assert "lend" not in Holdings(lending, tmp_path / "clients").site(["garden"]).questions, "a site that answers others must never lend"
    check_cross(EvaluationSettings(cross=True), "inprocess")
    check_cross(EvaluationSettings(), "flower")
    with pytest.raises(
        ValueError, match=r"evaluation.cross: personal leaves never leave their site, so with engine 'flower' .* set it to false"
    ):
        check_cross(EvaluationSettings(cross=True), "flower")


def test_an_unseen_client_takes_no_part_and_moves_nothing(whole, world, tmp_path):
    """The run is bit for bit the one of the other two clients alone."""
    assert set(whole.rounds[0]["clients"]) == {"bakery", "harbour"}
    assert not (whole.folder / "clients" / "garden").exists()
    assert "garden" not in whole.results
    alone = world.recipe(**LEAN, evaluation={**QUICK, "models": ["personal"], "experts": False})
    alone["data"]["path"] = str(tmp_path / "two")
    (tmp_path / "two").mkdir()
    for name in ("bakery", "harbour"):
        (tmp_path / "two" / f"{name}.jsonl").write_bytes((world.data / f"{name}.jsonl").read_bytes())
    assert run(alone, out=tmp_path / "run").digest == whole.digest


def test_unseen_clients_start_from_the_shared_leaves_and_adapt(whole):
    found = whole.further["unseen"]["garden"]
    assert list(found) == ["0", "3", "5"]
    assert list(found["0"]) == ["base", "personal"]  # no row, no graft: the shared leaves are its model
    assert list(found["5"]) == ["base", "shared", "trained", "personal"]
    assert len({found[count]["base"]["loss"] for count in found}) == 1
    assert found["0"]["personal"]["loss"] == found["3"]["shared"]["loss"] == found["5"]["shared"]["loss"]
    assert len({found[count]["personal"]["loss"] for count in found}) == 3
    assert further_tables(whole)[1].figure == "unseen"


def test_an_unseen_client_trains_as_if_it_were_asked_alone(session):
    """By hand: graft on the first rows, then two rounds, the second from what the first has left; no test row is there meanwhile."""
    opened = session(evaluation={**QUICK, "unseen": {**UNSEEN, "rows": [4]}})
    opened._open()
    opened._round()
    opened._begin("evaluation", 1)
    package = opened.method.pack(opened.method, opened.server, "garden")
    reply = next(iter(opened.engine.ask("evaluate_unseen", {"garden": package})))
    client = opened.reach.holdings.open("garden")
    rows = client.data.test
    client.data = replace(client.data, train=client.data.train[:4])
    shared = package.tree("shared")
    for number in (1, 2):
        facts = {"round": number, "lr": 1e-2}
        opened.method.train(opened.method, client, Bundle(trees={"shared": shared}, facts=facts))
        shared = client.memory.tree("trained")
    model = opened.method.answer(opened.method, client, package)["personal"]
    assert not equal(package.tree("shared"), shared)
    wanted = measure(client, {"personal": model}, rows, opened.recipe.evaluation)[0]["personal"]["loss"]
    assert reply.bundle.facts["unseen"]["4"]["personal"]["loss"] == pytest.approx(wanted, rel=1e-6)
    assert opened.engine.store.versions("garden") == []


def test_the_same_seed_holds_out_the_same_clients(session):
    held = {seed: tuple(session(evaluation={**QUICK, "unseen": {"clients": 1, "rows": [1]}}, seed=seed).reach.unseen) for seed in range(6)}
    assert len(set(held.values())) > 1
    assert tuple(session(evaluation={**QUICK, "unseen": {"clients": 1, "rows": [1]}}, seed=3).reach.unseen) == held[3]


@pytest.mark.parametrize(
    ("unseen", "message"),
    [
        ({"clients": ["gardens"]}, r"there is no client 'gardens' \(did you mean 'garden'\?\); clients: bakery, garden, harbour"),
        ({"clients": 3, "rows": [1]}, "of 3 clients nobody would be left to federate"),
        ({"clients": ["garden"]}, "client 'garden' has 14 training rows, 100 are asked for; lower it"),
        ({"clients": 1, "rows": [1, 1]}, r"rows names a number twice: \[1, 1\]"),
    ],
)
def test_unseen_clients_that_cannot_be(session, unseen, message):
    with pytest.raises(ValueError, match=message):
        session(evaluation={**QUICK, "unseen": unseen})


def test_a_shared_graft_needs_rows_to_begin_with(session):
    with pytest.raises(ValueError, match="with a shared graft a client has no model before it has chosen experts; leave 0 out"):
        session(method={"name": "flex", "shared_graft": True}, evaluation={**QUICK, "unseen": UNSEEN})


@pytest.mark.parametrize("split", ["validation", "test"])
def test_test_rows_are_out_of_sight_until_they_are_to_be_evaluated_on(world, tmp_path, split):
    """Whatever a method does with its client, in choosing, training, finishing and, on validation rows, in predicting."""
    seen = {}

    def spy(question):
        def look(method, client, package):
            seen[question] = bool(client.data.test)
            raise KeyError(question)

        return look

    holdings = Holdings(load_recipe(world.recipe(evaluation={**QUICK, "cross": True, "split": split})), tmp_path / "clients")
    parts = {"graft": "graft", "train": "train", "finish": "finish", "answer": "evaluate"}
    holdings.method = replace(holdings.method, **{part: spy(question) for part, question in parts.items()})
    site = holdings.site(list(holdings.clients), lends=True)
    package = Bundle(facts={"round": 0}).encode()
    for question in parts.values():
        with pytest.raises(KeyError, match=question):
            site.answer(question, "garden", package, asked=0, committed=0)
    assert seen == {"graft": False, "train": False, "finish": False, "evaluate": split == "test"}


def test_a_run_with_everything_resumes_to_the_same_results(whole, tmp_path):
    copy = shutil.copytree(whole.folder, tmp_path / "copy")
    (copy / "results.json").unlink()
    resume(copy)
    assert (copy / "results.json").read_bytes() == (whole.folder / "results.json").read_bytes()
    assert Record.load(copy).digest == whole.digest
