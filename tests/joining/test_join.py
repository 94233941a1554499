"""A new site joins a finished federation: the shared leaves stay as they are, its graft learns, its folder is used as any other."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

import fedgraft
from fedgraft.bundle import Bundle
from fedgraft.joining.join import Line, join, joined_recipe, lines_of, verdict
from fedgraft.report.progress import Quiet
from fedgraft.report.record import Record
from fedgraft.runner import resume
from fedgraft.session import Stopped
from fedgraft.tree import equal
from fedgraft.use.export.export import export
from tests.use.conftest import loss_on

STATE = "state/state.safetensors"
PACE = ("training.lr=0.05", "evaluation.resamples=200")


def shared(folder):
    return Bundle.load(folder / STATE).tree("shared")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """24 rows of a site that the federation has never seen."""
    path = tmp_path_factory.mktemp("new") / "mill.jsonl"
    splits = ["train"] * 12 + ["validation"] * 2 + ["test"] * 10
    lines = [
        json.dumps({"instruction": f"How many sacks on day {day}?", "output": f"There are {4 * day} sacks.", "split": split})
        for day, split in enumerate(splits)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def joined(trained, rows, tmp_path_factory):
    """The site's run; not to be changed."""
    return join(trained("flex").folder, rows, out=tmp_path_factory.mktemp("join") / "mill", rows=(3, 6, 500), steps=8, overrides=PACE)


def test_the_shared_leaves_stay_and_the_graft_learns(joined, trained):
    before = shared(trained("flex").folder)
    assert equal(shared(joined.folder), before)
    memory = Bundle.load(max((joined.folder / "clients" / "mill").glob("memory-*")))
    assert equal(memory.tree("trained"), before)
    assert set(memory.tree("personal")) == {key for key in memory.tree("personal") if ".side." in key}
    assert any(leaf.abs().max() > 0.01 for key, leaf in memory.tree("personal").items() if key.endswith("B"))
    assert joined.results["mill"]["personal"]["loss"] < joined.results["mill"]["shared"]["loss"] - 0.05
    assert list(joined.selection) == ["mill"]


def test_shared_is_the_federations_model(joined, trained):
    with fedgraft.load(trained("flex").folder, "shared") as loaded:
        loaded.source.recipe = loaded.source.recipe.model_copy(update={"data": fedgraft.load(joined.folder).source.recipe.data})
        assert loss_on(loaded, "mill") == joined.results["mill"]["shared"]["loss"]


def test_the_folder_is_used_as_any_other(joined, tmp_path):
    with fedgraft.load(joined.folder, "mill") as loaded:
        assert loaded.models == ["base", "shared", "mill"]
        assert loss_on(loaded, "mill") == joined.results["mill"]["personal"]["loss"]
    export(joined.folder, "mill", "fedgraft", tmp_path / "mill")
    export(joined.folder, "shared", "peft", tmp_path / "adapter")


def test_every_number_of_rows_is_measured_and_the_last_is_the_model_that_was_kept(joined):
    lines = lines_of(joined)
    assert [line.rows for line in lines] == [3, 6, 12]
    assert len({line.base for line in lines}) == len({line.shared for line in lines}) == 1
    assert len({line.personal for line in lines}) == 3
    assert lines[-1].personal == joined.results["mill"]["personal"]["loss"]
    for line in lines:
        assert line.gain == pytest.approx(line.shared - line.personal)
        low, high = line.interval
        assert low <= line.gain <= high
    recipe = joined.recipe
    assert (recipe["federation"]["rounds"], recipe["training"]["steps"]) == (4, 2)
    assert recipe["evaluation"]["unseen"] == {"clients": "all", "rows": [3, 6], "rounds": 4, "passes": None}


def test_fewer_rows_are_tried_as_a_run_with_as_many_would_train(joined, trained, rows, tmp_path):
    """The same start and steps; the rounds after the run's own draw other batches, which three rows for 8 steps of 2 hardly tell."""
    alone = join(trained("flex").folder, rows, out=tmp_path / "three", rows=(), steps=8, overrides=[*PACE, "data.train_rows=3"])
    assert lines_of(alone)[0].shared == lines_of(joined)[0].shared
    assert lines_of(alone)[0].personal == pytest.approx(lines_of(joined)[0].personal, abs=0.3)


def test_a_site_with_only_an_export_joins_alike(joined, trained, rows, tmp_path):
    """The coordinator hands out the shared leaves alone."""
    export(trained("flex").folder, "shared", "fedgraft", tmp_path / "export")
    found = join(tmp_path / "export", rows, out=tmp_path / "mill", rows=(3, 6), steps=8, overrides=PACE)
    assert [line.personal for line in lines_of(found)] == [line.personal for line in lines_of(joined)]


def test_a_graft_grows_on_what_another_method_shared(trained, rows, tmp_path):
    record = join(trained("fedavg").folder, rows, out=tmp_path / "mill", rows=(), steps=2)
    assert equal(shared(record.folder), shared(trained("fedavg").folder))
    assert [line.rows for line in lines_of(record)] == [12]


def test_private_routers_are_carried_over(trained, rows):
    first = trained("flex", method={"private_router": True}, lora={"targets": ["q", "router"]})
    recipe = joined_recipe(first.folder, rows, name="mill", rows=(), steps=1, overrides=())
    assert recipe.build_method().personal("layers.0.router.weight")


class Stop(Quiet):
    """Ctrl-C at the first reply of a phase."""

    def __init__(self, phase):
        self.wanted, self.phase = phase, ""

    def begin(self, phase, total):
        self.phase = phase

    def step(self, note=""):
        if self.phase == self.wanted:
            raise KeyboardInterrupt


@pytest.mark.parametrize("phase", ["training", "evaluation"])
def test_it_is_stopped_and_resumed_as_any_run(joined, trained, rows, tmp_path, phase):
    with pytest.raises(Stopped):
        join(trained("flex").folder, rows, out=tmp_path / "mill", rows=(3, 6), steps=8, overrides=PACE, progress=Stop(phase))
    found = resume(tmp_path / "mill")
    assert (lines_of(found), found.digest) == (lines_of(joined), joined.digest)


def test_the_pace_is_just_the_steps_or_three_passes(trained, rows):
    def pace(steps, *overrides):
        recipe = joined_recipe(trained("flex").folder, rows, name=None, rows=(3,), steps=steps, overrides=overrides)
        each, unseen = recipe.training.steps, recipe.evaluation.unseen
        return each, recipe.federation.rounds, unseen.rounds_of(3, each * recipe.training.batch_size)

    assert [pace(number) for number in (1, 2, 7, 10)] == [(1, 1, 1), (2, 1, 1), (1, 7, 7), (2, 5, 5)]
    assert pace(None) == (2, 9, 3)  # 3 x 12 and 3 x 3 rows in steps of 2 rows, 2 steps a round
    assert pace(None, "training.batch_size=12") == (2, 2, 1)
    assert pace(9, "training.steps=5") == (3, 3, 3)


def test_what_cannot_be_joined_is_refused(trained, rows, tmp_path):
    def refused(why, folder=None, data=rows, **options):
        with pytest.raises(ValueError, match=why):
            join(folder or trained("flex").folder, data, out=tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refused("its method 'local_graft' shares nothing", trained("local_graft").folder)
    refused("no adapter that a run begins with", trained("flex", method={"shared_graft": True}).folder)
    refused("there is no such file", data=tmp_path / "none.jsonl")
    refused("--name 'a b': cannot name a folder", name="a b")
    refused("nothing there to start from", tmp_path)
    export(trained("flex").folder, "shared", "peft", tmp_path / "adapter")
    refused("a PEFT adapter tells no recipe to join by", tmp_path / "adapter")
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a", "response": "b", "split": "train"}\n{"prompt": "c", "response": "d", "split": "validation"}\n')
    refused("client 'few' has no test rows; add rows, give some the field split: test", data=few)


def test_an_occupied_folder_is_kept(trained, rows, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ValueError, match="exists and is never overwritten"):
        join(trained("flex").folder, rows, out=tmp_path / "out", steps=1)


def line(rows, gain, low=None):
    return Line(rows=rows, base=3.0, shared=2.0, personal=2 - gain, gain=gain, interval=None if low is None else (low, gain + 1))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([line(10, -0.1, -0.3), line(30, 0.1, -0.1), line(100, 0.2, 0.05)], "pays from 100 training rows on: its loss is 0.200 below"),
        ([line(10, 0.2, 0.1), line(30, 0.3, 0.2)], r"pays from 10 training rows on: .* \(0.100 to 1.200\)"),
        ([line(10, 0.2, 0.1), line(30, -0.1, -0.2), line(100, 0.1, 0.01)], "pays from 100 training rows on"),
        ([line(10, 0.1, -0.1), line(30, 0.2, -0.1)], "From 10 training rows on the loss is below"),
        ([line(30, 0.2)], "From 30 training rows on the loss is below"),
        ([line(10, 0.2, 0.1), line(30, -0.1, -0.2)], "does not pay with these rows"),
    ],
)
def test_it_says_from_how_many_rows_the_graft_pays(lines, said):
    assert re.search(said, verdict(lines))
    assert "base" not in verdict(lines)
    worse = [*lines[:-1], replace(lines[-1], base=1.0)]
    assert verdict(worse) == f"{verdict(lines)} The untouched base is better still: 1.000 beside {lines[-1].personal:.3f}."


def test_join_as_it_is_typed(command, trained, rows, tmp_path):
    out = tmp_path / "mill"
    words = ("join", trained("flex").folder, "--data", rows, "--rows", "3,all", "--steps", "2", "--out", out)
    done = command(*words)
    assert done.code == 0, done.err
    assert "training" in done.err
    assert "mill: response loss (nats/token) on its test rows" in done.out
    assert f"fedgraft chat {out} --client mill" in done.out
    assert command(*words).code == 2  # never overwritten
    told = command(*words[:-1], tmp_path / "again", "--json", "--name", "mill")
    assert told.err == ""
    document = json.loads(told.out)
    assert document["verdict"] in done.out
    assert [found["rows"] for found in document["lines"]] == [3, 12]
    assert document["lines"][-1]["personal"] == Record.load(out).results["mill"]["personal"]["loss"]
    wrong = command("join", trained("flex").folder, "--data", rows, "--rows", "ten")
    assert (wrong.code, "--rows: 'ten' is no number of rows" in wrong.err) == (2, True)
