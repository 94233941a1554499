"""Run folders: never overwritten, resumed only with what they began with, extended at will."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from fedgraft import files, runner
from fedgraft.bundle import Bundle
from fedgraft.report.progress import Quiet
from fedgraft.report.record import Record
from fedgraft.runner import resume, run
from fedgraft.session import Session
from fedgraft.trouble import Stopped
from tests.run.world import contents

LEAN = {"training": {"steps": 1, "lr": 1e-3, "lr_min": 1e-3}, "evaluation": {"rows": 1, "generate": False, "models": ["personal"]}}
QUICK = LEAN | {"federation": {"rounds": 1}, "method": {"name": "fedavg"}}


class StopAt(Quiet):
    """Progress that presses Ctrl-C at the n-th step of a phase."""

    def __init__(self, phase: str, step: int) -> None:
        self.wanted, self.left, self.phase = phase, step, ""

    def begin(self, phase: str, total: int) -> None:
        self.phase = phase

    def step(self, note: str = "") -> None:
        self.left -= self.phase == self.wanted
        if self.left == 0:
            raise KeyboardInterrupt


def reader(name):
    """What reads a file of a run folder; a resume writes the results anew."""
    return Record.load if name == "results.json" else resume


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to be changed."""
    return shutil.copytree(finished.folder, tmp_path / "copy")


@pytest.fixture
def short(world, tmp_path):
    """A finished run of one FedAvg round, to be changed."""
    return run(world.recipe(**QUICK), out=tmp_path / "short").folder


@pytest.mark.parametrize("name", ["a run", "somebody's file"])
def test_a_folder_with_content_is_refused_and_untouched(world, finished, tmp_path, name):
    folder = finished.folder if name == "a run" else tmp_path
    (tmp_path / "letter.txt").write_text("mine")
    before = contents(folder)
    with pytest.raises(ValueError, match=r"never overwritten.*fedgraft resume"):
        run(world.recipe(), out=folder)
    assert contents(folder) == before


def test_a_file_is_no_run_folder(world, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="exists and is never overwritten"):
        run(world.recipe(), out=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_refused_recipe_leaves_no_folder(world, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        run(world.recipe(model={"name": "./nowhere"}), out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"'bakery' has no test rows to be evaluated on; raise data.test_rows"):
        run(world.recipe(data={"test_rows": 0}), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_resuming_a_finished_run_changes_nothing(copy):
    before = contents(copy)
    assert resume(copy).finished
    assert contents(copy) == before


def test_a_finished_run_is_complete(finished):
    assert finished.finished
    assert finished.method == "flex"
    assert [line["round"] for line in finished.rounds] == [0, 1, 2]
    assert sorted(finished.results) == sorted(finished.selection) == ["bakery", "garden", "harbour"]
    assert {"fedgraft", "packages", "base_digest", "data_digest", "threads", "clients"} <= finished.environment.keys()
    assert finished.environment["clients"]["garden"] == {"garden": 14}
    digests = json.loads((finished.folder / "digest.json").read_text())
    assert digests["state"] == Bundle.load(finished.folder / "state" / "state.safetensors").digest()
    newest = max((finished.folder / "clients" / "bakery").iterdir())
    assert digests["clients"]["bakery"] == Bundle.load(newest).digest()


def test_the_same_recipe_gives_the_same_bits_and_another_seed_does_not(world, finished, tmp_path):
    assert run(world.recipe(), out=tmp_path / "again").digest == finished.digest
    assert run(world.recipe(seed=8, **LEAN), out=tmp_path / "other").digest != run(world.recipe(**LEAN), out=tmp_path / "one").digest


def test_a_runs_own_recipe_gives_the_same_bits(finished, tmp_path):
    again = run(finished.folder / "recipe.yaml", out=tmp_path / "again")
    assert again.digest == finished.digest
    assert again.results == finished.results
    assert again.recipe == finished.recipe


def test_relative_paths_are_resumed_from_anywhere(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world.model.parent)
    recipe = world.recipe(**QUICK, model={"name": "./model"}, data={"path": "clients"})
    folder = run(recipe, out=tmp_path / "out").folder
    monkeypatch.chdir(tmp_path)
    assert resume(folder).finished


def test_extending_is_running_longer_in_the_first_place(world, tmp_path):
    """With lr = lr_min the schedule does not depend on the number of rounds."""
    long = run(world.recipe(**LEAN, federation={"rounds": 4}), out=tmp_path / "long")
    folder = run(world.recipe(**LEAN, federation={"rounds": 2}), out=tmp_path / "short").folder
    extended = resume(folder, rounds=4)
    assert extended.digest == long.digest
    assert extended.results == long.results
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["federation"]["rounds"] == 4
    assert [line["round"] for line in extended.rounds] == [0, 1, 2, 3]


def test_an_extension_that_was_stopped_is_unfinished_and_goes_on(short):
    with pytest.raises(Stopped):
        resume(short, rounds=3, progress=StopAt("training", 4))
    half = Record.load(short)
    assert not half.finished  # the results on disk are those of one round
    assert half.results == {}
    assert half.digest == ""
    assert len(resume(short).rounds) == 3


def test_fewer_rounds_than_done_are_refused(copy):
    before = contents(copy)
    with pytest.raises(ValueError, match=r"3 rounds are done already; --rounds must not be below that"):
        resume(copy, rounds=2)
    assert contents(copy) == before


@pytest.mark.parametrize(("phase", "step"), [("selection", 2), ("training", 5), ("evaluation", 1)])
def test_ctrl_c_names_the_folder_and_resume_ends_equal(world, finished, tmp_path, phase, step):
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(world.recipe(), out=tmp_path / "out", progress=StopAt(phase, step))
    assert stopped.value.folder == tmp_path / "out"
    resumed = resume(tmp_path / "out")
    assert resumed.digest == finished.digest
    assert resumed.results == finished.results


def test_half_a_line_of_rounds_is_dropped_before_more_are_written(world, finished, tmp_path):
    with pytest.raises(Stopped):
        run(world.recipe(), out=tmp_path / "out", progress=StopAt("training", 4))
    with (tmp_path / "out" / "rounds.jsonl").open("a") as sink:
        sink.write('{"round": 1, "lr"')
    resumed = resume(tmp_path / "out")
    assert [line["round"] for line in resumed.rounds] == [0, 1, 2]
    assert resumed.digest == finished.digest


def test_leftovers_of_killed_writes_are_cleared(short):
    aside = short / "state" / ".state.safetensors.4711.tmp"
    aside.write_bytes(b"half")
    resume(short)
    assert not aside.exists()


def test_a_folder_with_nothing_but_leftovers_counts_as_empty(world, tmp_path):
    (tmp_path / ".recipe.yaml.4711.tmp").write_bytes(b"half")
    assert run(world.recipe(**QUICK), out=tmp_path).finished


def test_another_base_model_is_refused(world, short):
    other = shutil.copytree(world.model, short.parent / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    recipe = (short / "recipe.yaml").read_text()
    (short / "recipe.yaml").write_text(recipe.replace(str(world.model), str(other)))
    with pytest.raises(ValueError, match=r"the base model '.*' differs from the one this run began with; restore it, or start a new run"):
        resume(short)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_other_data_are_refused(world, short, split):
    other = shutil.copytree(world.data, short.parent / "other")
    text = (other / "garden.jsonl").read_text().splitlines()
    row = next(number for number, line in enumerate(text) if json.loads(line)["split"] == split)
    text[row] = text[row].replace("There are", "There were")
    (other / "garden.jsonl").write_text("\n".join(text) + "\n")
    recipe = (short / "recipe.yaml").read_text()
    (short / "recipe.yaml").write_text(recipe.replace(str(world.data), str(other)))
    with pytest.raises(ValueError, match="the data of client 'garden' differ from those this run began with; restore them"):
        resume(short)


@pytest.mark.parametrize("name", ["state/state.safetensors", "environment.json", "recipe.yaml", "rounds.jsonl", "results.json"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_file_is_named(short, name, damage):
    content = (short / name).read_bytes()
    end = content.index(b"training:") + 3 if name == "recipe.yaml" else len(content) // 2  # in mid-word: half a recipe may be whole YAML
    (short / name).write_bytes(content[:end].rstrip() + b"\n" if damage == "cut" else b"[: nonsense\n")
    with pytest.raises(ValueError, match=name.rsplit("/", maxsplit=1)[-1]):
        reader(name)(short)


def test_a_damaged_memory_is_named(copy):
    newest = max((copy / "clients" / "garden").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{newest}: damaged"):
        resume(copy)


@pytest.mark.parametrize("name", ["environment.json", "recipe.yaml", "results.json"])
def test_a_newer_schema_is_refused(short, name):
    text = (short / name).read_text()
    assert text.count('"schema": 1') + text.count("schema: 1\n") == 1
    (short / name).write_text(text.replace('"schema": 1', '"schema": 2').replace("schema: 1\n", "schema: 2\n"))
    with pytest.raises(ValueError, match=rf"{name}: written by a newer fedgraft \(schema 2, this one reads up to 1\); upgrade"):
        reader(name)(short)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_no_run_folder_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    for use in (resume, Record.load):
        with pytest.raises(ValueError, match="not a run folder"):
            use(tmp_path / name)


def test_pretrained_weights_never_change(world, tmp_path):
    session = Session(runner.load_recipe(world.recipe(**LEAN)), tmp_path / "out", runner.Quiet())
    before = session.reach.holdings.model.frozen_digest()
    session.folder.mkdir()
    files.write_text(session.folder / "recipe.yaml", yaml.safe_dump({"schema": 1, **session.recipe.complete()}))
    session.go()
    assert session.reach.holdings.model.frozen_digest() == before
    assert all(parameter.grad is None for parameter in session.reach.holdings.model.base.model.parameters())


def test_results_hold_the_models_that_a_method_has(world, finished, tmp_path):
    """FedAvg has nothing personal, so `shared` would be `personal`; Local has nothing aggregated, so `trained` would be."""
    names = {"flex": set(finished.results["bakery"])}
    for method in ("fedavg", "local"):
        recipe = world.recipe(method={"name": method}, federation={"rounds": 1}, training={"steps": 1}, evaluation={"generate": False})
        record = run(recipe, out=tmp_path / method)
        names[method] = set(record.results["bakery"])
        if method == "local":
            assert record.results["bakery"]["personal"]["loss"] != record.results["bakery"]["base"]["loss"]
    assert names == {
        "flex": {"base", "shared", "trained", "personal"},
        "fedavg": {"base", "trained", "personal"},
        "local": {"base", "personal"},
    }


def test_evaluation_of_no_rounds_is_the_base_model(world, tmp_path):
    """LoRA with B = 0 adds nothing, and dropout is off whether or not anything was trained in the process."""
    recipe = world.recipe(method={"name": "fedavg"}, federation={"rounds": 0}, lora={"dropout": 0.5}, evaluation={"generate": False})
    models = run(recipe, out=tmp_path / "none").results["harbour"]
    assert models["personal"] == models["base"] | {"gain": 0.0}


def test_a_fresh_process_state_evaluates_as_the_one_that_trained(copy, finished):
    """Dropout is off in a session that never trained."""
    for name in ("results.json", "digest.txt"):
        (copy / name).unlink()
    assert resume(copy).results == finished.results
