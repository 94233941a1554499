"""Runs over a grid: bit for bit those in process; what a network or a site does wrong is survived and named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedgraft import reach, runner
from fedgraft.bundle import Bundle
from fedgraft.report.progress import Quiet
from fedgraft.trouble import Stopped
from tests.engine.conftest import Node

LEAN = {"federation": {"rounds": 2}, "training": {"optimizer_state": "kept"}}
FLOWER = {"name": "flower", "clients": 3, "wait_seconds": 0.05, "deadline_seconds": 0.05}
CASES = {
    "flex": {},
    "flex-shared": {"options": {"shared_graft": True}},
    "fedavg": {},
    "fedavg-router": {"lora": {"targets": ["q", "router"]}},
    "scaffold": {},
    "hetlora": {"options": {"ranks": [4, 2, 3]}},
    "fedrep": {},
    "fedavg_ft": {},
}


class Watch(Quiet):
    """Keeps warnings; presses Ctrl-C at the n-th training step."""

    def __init__(self, stop: int = 0) -> None:
        self.warnings: list[str] = []
        self.phase, self.left = "", stop

    def begin(self, phase: str, total: int) -> None:
        self.phase = phase

    def step(self, note: str = "") -> None:
        self.left -= self.phase == "training"
        if self.left == 0 and self.phase == "training":
            raise KeyboardInterrupt

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def flower(recipe: dict[str, Any], **engine: Any) -> dict[str, Any]:
    return recipe | {"engine": FLOWER | engine}


def digests(folder, sites=None):
    """Digests of the state and of every client's newest memory, found below the run folder or where the sites keep them."""
    newest = {client.name: max(client.iterdir()) for client in (sites or folder).rglob("*") if any(client.glob("memory-*"))}
    state = Bundle.load(folder / "state" / "state.safetensors").digest()
    return {"state": state, **{name: Bundle.load(path).digest() for name, path in newest.items()}}


def facts(record):
    return Bundle.load(record.folder / "state" / "state.safetensors").facts


def timeless(record):
    keys = ("round", "lr", "loss", "tokens", "bytes_down")
    return [{key: line[key] for key in keys} for line in record.rounds], record.results, record.selection


@pytest.mark.parametrize("case", CASES)
def test_a_run_over_a_grid_is_the_run_in_process(place, tmp_path, grid_of, case):
    recipe = place.recipe(case.partition("-")[0], **CASES[case] | LEAN)
    here = runner.run(recipe, out=tmp_path / "here")
    afar = runner.run(flower(recipe), out=tmp_path / "afar", connect=reach.over(grid_of()))
    assert digests(afar.folder, tmp_path / "sites") == digests(here.folder)
    assert timeless(afar) == timeless(here)
    assert facts(afar) == facts(here)  # the same count of questions, so that memories have the same versions
    assert json.loads((afar.folder / "digest.json").read_text()) == {"schema": 1, "state": digests(here.folder)["state"], "clients": {}}
    assert not (afar.folder / "clients").exists()
    same = ("base_digest", "data_digest", "client_digests", "clients", "device", "threads")
    assert {key: afar.environment[key] for key in same} == {key: here.environment[key] for key in same}


def test_a_run_over_a_grid_starts_from_leaves_that_the_sites_never_see(place, tmp_path, grid_of):
    first = runner.run(place.recipe("fedavg", federation={"rounds": 1}), out=tmp_path / "first")
    recipe = place.recipe("flex", **LEAN | {"lora": {"init": str(first.folder)}})
    here = runner.run(recipe, out=tmp_path / "here")
    grid = grid_of()
    afar = runner.run(flower(recipe), out=tmp_path / "afar", connect=reach.over(grid))
    assert digests(afar.folder, tmp_path / "sites") == digests(here.folder)
    assert afar.environment["start_digest"] == here.environment["start_digest"]
    assert not any("init" in frame.facts.get("recipe", {}).get("lora", {}) for frame in grid.requests)


@pytest.mark.parametrize("method", ["local", "ditto", "ffa_lora"])
def test_leaves_that_sites_keep_cannot_start_from_a_folder_they_do_not_have(place, tmp_path, grid_of, method):
    first = runner.run(place.recipe("fedavg", federation={"rounds": 1}), out=tmp_path / "first")
    recipe = flower(place.recipe(method, **LEAN | {"lora": {"init": str(first.folder)}}))
    with pytest.raises(ValueError, match=f"lora.init: method '{method}' keeps layers.* at the sites, which never see that folder"):
        runner.run(recipe, out=tmp_path / "afar", connect=reach.over(grid_of()))


@pytest.mark.parametrize("case", ["flex", "scaffold"])
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_coordinator_stopped_and_started_again_with_new_hosts_ends_equal(place, tmp_path, grid_of, case, step):
    """Step 3 is the last reply before a commit; two rounds of three clients."""
    recipe = place.recipe(case, **LEAN)
    whole = runner.run(recipe, out=tmp_path / "whole")
    with pytest.raises(Stopped):
        runner.run(flower(recipe), out=tmp_path / "cut", progress=Watch(step), connect=reach.over(grid_of()))
    resumed = runner.resume(tmp_path / "cut", connect=reach.over(grid_of()))
    assert digests(resumed.folder, tmp_path / "sites") == digests(whole.folder)
    assert timeless(resumed) == timeless(whole)


def test_what_is_asked_and_what_is_committed_travel_with_every_question(place, tmp_path, grid_of):
    """The shared graft asks a second time before the first commit."""
    grid = grid_of()
    recipe = flower(place.recipe("flex", options={"shared_graft": True}, federation={"rounds": 2}))
    runner.run(recipe, out=tmp_path / "run", connect=reach.over(grid))
    asked = [frame.facts for frame in grid.requests if frame.facts.get("client") == "ada"]
    assert [(facts["question"], facts["asked"], facts["committed"]) for facts in asked[:4]] == [
        ("graft", 0, 0),
        ("graft", 1, 0),
        ("train", 2, 2),
        ("train", 3, 3),
    ]


def in_round(number, fate, client="bo"):
    """The fate of one training request, counted from 0."""

    def decide(frame):
        hit = frame.kind == "ask" and frame.facts["question"] == "train" and frame.facts["client"] == client
        return fate if hit and Bundle.decode(frame.content).facts["round"] == number else ""

    return decide


FATES = {
    "late": "client 'bo' did not answer within 0.05 s",
    "down": "client 'bo' did not answer within 0.05 s",
    "damaged": "the reply of client 'bo': damaged or not written by fedgraft (ValueError: its checksum does not fit)",
    "error": "the reply of client 'bo': Flower reports error 0 (KeyError: 'oops'); the site's log says more",
}


@pytest.mark.parametrize("fate", FATES)
def test_a_reply_that_cannot_be_used_is_named_and_the_round_goes_on(place, start, tmp_path, grid_of, fate):
    """The state is that of a run in process whose reply was lost, before the client trained (down, error) or after (late, damaged)."""
    watch = Watch()
    recipe = flower(place.recipe("scaffold", federation={"rounds": 3}))
    record = runner.run(recipe, out=tmp_path / "run", progress=watch, connect=reach.over(grid_of(fate=in_round(1, fate))))
    assert [sorted(line["clients"]) for line in record.rounds] == [["ada", "bo", "cy"], ["ada", "cy"], ["ada", "bo", "cy"]]
    (failed,) = [line["failed"] for line in record.rounds if "failed" in line]
    assert set(failed) == {"bo"}
    assert failed["bo"].startswith(FATES[fate])
    assert watch.warnings == [f"{failed['bo']}. It is left out here; its own state is kept on its side"]
    trained = fate in {"late", "damaged"}
    run = start("scaffold", lost=lambda *which: trained and which == ("train", 1, "bo"), federation={"rounds": 3})
    if not trained:
        ask, server = run.session.engine.ask, run.session.server
        run.session.engine.ask = lambda question, packages: ask(
            question, {name: package for name, package in packages.items() if (question, server.round, name) != ("train", 1, "bo")}
        )
    run.go()
    assert Bundle.load(record.folder / "state" / "state.safetensors").digest() == run.session.server.state.digest()


def test_a_round_without_any_reply_ends_the_run_and_loses_nothing(place, tmp_path, grid_of):
    recipe = flower(place.recipe("fedavg", **LEAN))
    fate = lambda frame: next((found for name in ("ada", "bo", "cy") if (found := in_round(1, "down", name)(frame))), "")  # noqa: E731
    with pytest.raises(ValueError, match=r"no client could train in round 2:\nclient 'ada' did not answer .*\n.*\n.*\nNothing is lost"):
        runner.run(recipe, out=tmp_path / "run", connect=reach.over(grid_of(fate=fate)))
    resumed = runner.resume(tmp_path / "run", connect=reach.over(grid_of()))
    assert digests(resumed.folder)["state"] == digests(runner.run(place.recipe("fedavg", **LEAN), out=tmp_path / "whole").folder)["state"]


def test_training_that_fails_at_a_site_is_told_as_in_process(place, tmp_path, grid_of, monkeypatch):
    from fedgraft.training import client as module
    from fedgraft.training.fit import NotFiniteError

    fit = module.fit

    def failing(*arguments, seed, **options):
        failing.calls += 1
        if failing.calls == 2:
            raise NotFiniteError("the loss became nan")
        return fit(*arguments, seed=seed, **options)

    failing.calls = 0
    monkeypatch.setattr(module, "fit", failing)
    watch = Watch()
    record = runner.run(flower(place.recipe("fedavg", **LEAN)), out=tmp_path / "run", progress=watch, connect=reach.over(grid_of()))
    assert record.rounds[0]["failed"] == {"bo": "client 'bo', round 1: the loss became nan"}
    assert watch.warnings == ["client 'bo', round 1: the loss became nan. It sits this round out with the memory it had"]


def test_a_refusal_of_a_site_is_named(place, tmp_path, grid_of):
    grid = grid_of()
    answer = grid.nodes[101].app

    def refusing(message, context):
        from flwr.app import Message

        from fedgraft.engine.wire import Frame

        if Frame.of_records(message.content).facts.get("question") != "train":
            return answer(message, context)
        return Message(Frame(kind="refused", facts={"reason": "its policy allows no training"}).records(), reply_to=message)

    grid.nodes[101] = Node(refusing, 1)
    record = runner.run(flower(place.recipe("fedavg", federation={"rounds": 1})), out=tmp_path / "run", connect=reach.over(grid))
    assert record.rounds[0]["failed"] == {"bo": "client 'bo': its policy allows no training"}


def test_a_node_that_is_gone_is_lost_and_back_under_another_number_is_asked_again(place, tmp_path, grid_of):
    grid, node = grid_of(), None

    def fate(frame):
        nonlocal node
        number = Bundle.decode(frame.content).facts["round"] if frame.content else 0
        if number == 0 and node is None and frame.facts.get("question") == "train" and frame.facts["client"] == "cy":
            node = grid.nodes.pop(101)
        if number == 1 and frame.facts.get("client") == "cy" and 201 not in grid.nodes:
            grid.nodes[201] = node
        return ""

    grid.fate = fate
    record = runner.run(flower(place.recipe("fedavg", federation={"rounds": 3})), out=tmp_path / "run", connect=reach.over(grid))
    assert [line.get("failed") for line in record.rounds] == [None, {"bo": "client 'bo': its node 101 is not connected"}, None]


@pytest.mark.parametrize("there", [0, 2])
def test_too_few_clients_are_told(place, tmp_path, grid_of, there):
    come = "ada, bo" if there else "none"
    with pytest.raises(ValueError, match=rf"{there} of 3 clients have come within 0\.05 s \({come}\); start the others' sites, raise"):
        runner.run(flower(place.recipe("fedavg")), out=tmp_path / "run", connect=reach.over(grid_of(there)))
    assert not (tmp_path / "run").exists()


def test_waiting_ends_when_what_is_waited_for_is_gone(place, tmp_path, grid_of):
    """As when the simulation breaks down; there is no deadline here."""
    grid, calls = grid_of(), []

    def alive():
        calls.append(1)
        if len(calls) > 5:
            raise ValueError("the simulation has ended")

    def connect(recipe, folder, run, listener):
        found = reach.over(grid)(recipe, folder, run, listener)
        found._engine.alive = alive
        return found

    grid.fate = in_round(0, "down")
    recipe = flower(place.recipe("fedavg"), deadline_seconds=None)
    with pytest.raises(ValueError, match="the simulation has ended"):
        runner.run(recipe, out=tmp_path / "run", connect=connect)
    assert len(calls) == 6


def test_silent_and_refusing_nodes_are_told_apart(place, tmp_path, grid_of):
    grid = grid_of(5)
    del grid.nodes[102]
    grid.fate = lambda frame: "down" if grid.count == 2 else ""
    with pytest.raises(
        ValueError, match=r"1 of 3 clients .* \(ada\); 1 nodes are connected and have not answered; .*\nnode 103: this is node 3"
    ):
        runner.run(flower(place.recipe("fedavg")), out=tmp_path / "run", connect=reach.over(grid))


def test_two_nodes_of_one_name_are_refused_by_number(place, tmp_path, grid_of):
    grid = grid_of()
    grid.nodes[102] = Node(grid.nodes[102].app, 0)
    with pytest.raises(ValueError, match="nodes 100 and 102 both say they are client 'ada'; stop one of them"):
        runner.run(flower(place.recipe("fedavg")), out=tmp_path / "run", connect=reach.over(grid))


def test_a_node_is_the_client_of_its_key(place, tmp_path, grid_of):
    names = {100: "ada", 101: "cy", 102: "bo"}  # 101 and 102 hold the rows of bo and cy
    with pytest.raises(ValueError, match=r"(?s)1 of 3 clients .*\(ada\).*node 101: it says it is client 'bo', its key is that of 'cy'"):
        runner.run(flower(place.recipe("fedavg")), out=tmp_path / "run", connect=reach.over(grid_of(), names))
    known = {100: "ada", 101: "bo", 102: "cy"}
    assert runner.run(flower(place.recipe("fedavg")), out=tmp_path / "again", connect=reach.over(grid_of(), known)).finished


def test_another_base_at_one_site_is_refused_by_name(place, tmp_path, grid_of):
    import shutil

    from fedgraft.engine.flower import client_app
    from fedgraft.hosting import Host

    other = shutil.copytree(place.model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    grid = grid_of()
    grid.nodes[101] = Node(client_app(Host(memories=lambda run: tmp_path / run, model={"name": str(other)}).handle), 1)
    with pytest.raises(ValueError, match=r"the clients hold different base models \(\w{12} at ada, cy; \w{12} at bo\); give all of them"):
        runner.run(flower(place.recipe("fedavg")), out=tmp_path / "run", connect=reach.over(grid))


def test_other_data_at_a_resume_are_refused_by_name(place, tmp_path, grid_of):
    recipe = flower(place.recipe("fedavg", federation={"rounds": 1}))
    folder = runner.run(recipe, out=tmp_path / "run", connect=reach.over(grid_of())).folder
    environment = json.loads((folder / "environment.json").read_text())
    environment["client_digests"]["bo"] = "0" * 64
    (folder / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(ValueError, match="the data of client 'bo' differ from those this run began with"):
        runner.resume(folder, connect=reach.over(grid_of()))


@pytest.mark.parametrize(
    ("method", "engine", "message"),
    [
        ("centralised", FLOWER, "method 'centralised' pools the clients' rows, which stay where they are; set it to inprocess"),
        ("fedavg", {"name": "inprocess"}, "engine.name: 'inprocess' does not run over sites elsewhere; set it to flower"),
    ],
)
def test_what_cannot_run_over_a_grid_is_refused(place, tmp_path, grid_of, method, engine, message):
    with pytest.raises(ValueError, match=message):
        runner.run(place.recipe(method) | {"engine": engine}, out=tmp_path / "run", connect=reach.over(grid_of()))


def test_equal_packages_travel_as_one_object_of_flowers(place, tmp_path, grid_of):
    """Flower keeps content by its hash: a package that is the same for all clients is stored once."""
    grid = grid_of()
    runner.run(flower(place.recipe("fedavg", federation={"rounds": 1})), out=tmp_path / "run", connect=reach.over(grid))
    asked = [frame for frame in grid.requests if frame.facts.get("question") == "train"]
    assert len(asked) == 3
    assert len({frame.records()["body"].object_id for frame in asked}) == 1
