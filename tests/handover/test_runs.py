"""Runs that start from leaves which are there already."""

from __future__ import annotations

import json
import shutil

import pytest

from fedgraft.bundle import Bundle
from fedgraft.engine.wire import Frame
from fedgraft.hosting import Host
from fedgraft.recipe import load_recipe
from fedgraft.report.progress import Quiet
from fedgraft.runner import resume, run
from fedgraft.session import Session
from fedgraft.tree import equal, partition

STATE = "state/state.safetensors"


def shared(folder):
    return Bundle.load(folder / STATE).tree("shared")


@pytest.fixture
def session(world, tmp_path):
    """`session(name, first, **sections)`: a run that would start from the run `first`, not begun."""

    def make(name, first, **sections):
        recipe = world.recipe(method={"name": name}, lora={"init": str(first.folder)}, federation={"rounds": 1}, **sections)
        return Session(load_recipe(recipe).absolute(), tmp_path / "run", Quiet())

    return make


def test_round_0_starts_from_the_leaves(trained, session):
    first = trained("fedavg")
    opened = session("flex", first)
    opened._open()
    assert equal(opened.server.state.tree("shared"), shared(first.folder))


def test_leaves_that_clients_keep_start_from_them_too(trained, session):
    """Those that a client draws by itself: B of FedSA-LoRA, all of Local, A of FFA-LoRA, which is never trained."""
    first = trained("fedavg")
    for name in ("local", "fedsa_lora", "ffa_lora"):
        opened = session(name, first)
        kept = opened.method.personal
        client = opened.reach.holdings.open("garden")
        fresh = opened.method.fresh(opened.method, client)
        assert equal(partition(fresh, kept)[0], partition(shared(first.folder), kept)[0])


def test_a_method_that_draws_its_pairs_anew_refuses(trained, session):
    with pytest.raises(ValueError, match=r"lora.init: this method draws new pairs in every round"):
        session("flora", trained("fedavg"))


def test_a_changed_source_is_refused_on_resume(trained, world, tmp_path):
    first = tmp_path / "first"
    shutil.copytree(trained("fedavg").folder, first)
    recipe = world.recipe(method={"name": "fedavg"}, lora={"init": str(first)}, federation={"rounds": 1})
    record = run(recipe, out=tmp_path / "run")
    known = json.loads((record.folder / "environment.json").read_text())
    assert len(known["start_digest"]) == 64
    assert resume(record.folder, rounds=2).finished
    state = Bundle.load(first / STATE)
    changed = {key: leaf + 1 for key, leaf in state.tree("shared").items()}
    Bundle(trees={"shared": changed}, facts=state.facts).save(first / STATE)
    with pytest.raises(ValueError, match=r"the leaves of lora.init differ from those this run began with"):
        resume(record.folder, rounds=3)
    shutil.rmtree(first)
    with pytest.raises(ValueError, match=r"lora.init: .*no such folder"):
        resume(record.folder, rounds=3)


def test_a_refused_source_leaves_no_folder(trained, world, tmp_path):
    recipe = world.recipe(method={"name": "fedavg"}, lora={"init": str(trained("fedavg").folder), "rank": 3})
    with pytest.raises(ValueError, match=r"set lora.rank to 2"):
        run(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_site_reads_no_folder_that_a_coordinator_names(trained, world, tmp_path):
    recipe = world.recipe(method={"name": "fedavg"}, lora={"init": str(trained("fedavg").folder)})
    host = Host(memories=lambda run: tmp_path / run)
    response = Frame.decode(host.handle(Frame(kind="join", facts={"run": "one", "recipe": recipe}).encode(), 0))
    assert response.kind == "refused"
    assert "a site reads no folder that a coordinator names" in response.facts["reason"]
