"""Carrying out, skipping, continuing and failing: runs in this process, so that a start costs nothing; one sweep with real processes."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess

import pytest
import yaml

from fedgraft import runner
from fedgraft.report.progress import Quiet
from fedgraft.report.record import Record, read_document
from fedgraft.signals import Terminated
from fedgraft.sweep import execute as execute_module
from fedgraft.sweep.execute import execute
from fedgraft.sweep.plan import plan
from fedgraft.trouble import Stopped

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in Click:DeprecationWarning")
SMALL = {"federation": {"rounds": 1}, "training": {"steps": 1}, "evaluation": {"generate": False, "rows": 1}, "selection": None}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(execute_module, "POLL", 0.0)


@pytest.fixture
def recipe(world):
    return world.recipe(method={"name": "fedavg"}, **SMALL)


class Heard(Quiet):
    """Keeps what it is told."""

    def __init__(self):
        self.total, self.steps, self.warnings = 0, [], []

    def begin(self, phase, total):
        self.total = total

    def step(self, note=""):
        self.steps.append(note)

    def warn(self, text):
        self.warnings.append(text)


class Done:
    """A process that has ended."""

    def __init__(self, code: int):
        self.code = code

    def poll(self):
        return self.code

    def wait(self, timeout=None):
        return self.code

    def terminate(self):
        raise AssertionError("it has ended")


class Inline:
    """Runs the commands in this process; `broken`: points whose start fails, `cut`: those that are interrupted after a commit."""

    def __init__(self, broken=(), cut=()):
        self.broken, self.cut, self.started = set(broken), set(cut), []

    def __call__(self, words, log, threads):
        self.started.append((words[0], log.stem))
        with log.open("a", encoding="utf-8", newline="\n") as sink:
            if log.stem in self.broken:
                sink.write("loading 1/2\nerror: the dog ate it\n")
                return Done(2)
            progress = Cutting() if log.stem in self.cut else None
            with contextlib.suppress(Stopped):
                if words[0] == "run":
                    runner.run(words[1], out=words[3], progress=progress)
                else:
                    runner.resume(words[1])
                return Done(0)
            return Done(130)


class Cutting(Quiet):
    """Interrupts the evaluation."""

    def begin(self, phase, total):
        if phase == "evaluation":
            raise KeyboardInterrupt


def test_every_point_is_an_ordinary_run(recipe, tmp_path):
    points, heard, launch = plan(recipe, ["method=fedavg,local", "seed=0,1"]), Heard(), Inline()
    outcome = execute(tmp_path / "sweep", points, progress=heard, launch=launch)
    assert outcome.finished == [point.name for point in points] == ["fedavg_seed-0", "fedavg_seed-1", "local_seed-0", "local_seed-1"]
    assert launch.started == [("run", name) for name in outcome.finished]
    assert (heard.total, len(heard.steps)) == (4, 4)
    record = Record.load(tmp_path / "sweep" / "local_seed-1")
    assert record.digest == runner.run(points[3].recipe, out=tmp_path / "alone").digest
    loss = sum(figures["personal"]["loss"] for figures in record.results.values()) / 3
    assert heard.steps[3] == f"local_seed-1  response loss (nats/token) {loss:.3f}"
    document = read_document(tmp_path / "sweep" / "sweep.json")
    assert [entry["settings"] for entry in document["points"]] == [point.settings for point in points]


def test_finished_points_are_skipped_and_a_larger_grid_adds(recipe, tmp_path):
    folder = tmp_path / "sweep"
    execute(folder, plan(recipe, ["seed=0,1"]), progress=Quiet(), launch=Inline())
    launch, heard = Inline(), Heard()
    outcome = execute(folder, plan(recipe, ["seed=1,2"]), progress=heard, launch=launch)
    assert launch.started == [("run", "seed-2")]
    assert heard.total == 1
    assert outcome.finished == ["seed-1", "seed-2"]
    assert [entry["name"] for entry in read_document(folder / "sweep.json")["points"]] == ["seed-0", "seed-1", "seed-2"]


def test_a_failed_point_does_not_stop_the_others_and_is_tried_again(recipe, tmp_path):
    folder, points, heard = tmp_path / "sweep", plan(recipe, ["seed=0,1"]), Heard()
    outcome = execute(folder, points, progress=heard, launch=Inline(broken=["seed-0"]))
    assert outcome.finished == ["seed-1"]
    assert outcome.failures == {"seed-0": f"the dog ate it (exit code 2, log in {folder / 'logs' / 'seed-0.log'})"}
    assert "seed-0 failed" in heard.warnings[0]
    assert "the dog ate it" in read_document(folder / "sweep.json")["points"][0]["failure"]
    again = Inline()
    assert execute(folder, points, progress=Quiet(), launch=again).failures == {}
    assert again.started == [("run", "seed-0")]
    assert read_document(folder / "sweep.json")["points"][0]["failure"] == ""


def test_a_stopped_point_is_resumed(recipe, tmp_path):
    folder, points = tmp_path / "sweep", plan(recipe, ["seed=0"])
    assert execute(folder, points, progress=Quiet(), launch=Inline(cut=["seed-0"])).failures
    again = Inline()
    execute(folder, points, progress=Quiet(), launch=again)
    assert again.started == [("resume", "seed-0")]
    assert Record.load(folder / "seed-0").digest == runner.run(points[0].recipe, out=tmp_path / "alone").digest


class Endless(Done):
    """A process that runs until it is told to stop."""

    def __init__(self, code=None):
        super().__init__(code)
        self.told = False

    def wait(self, timeout=None):
        if timeout is not None and not self.told:
            raise subprocess.TimeoutExpired("it", timeout)
        assert self.told, "waits for ever"
        return 143

    def terminate(self):
        self.told = True


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated, OSError])
def test_no_process_outlives_the_sweep(recipe, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(execute_module, "GRACE", 0.0)
    started = []

    def launch(words, log, threads):
        started.append(Endless())
        return started[-1]

    def raising(seconds):
        raise stop

    monkeypatch.setattr(execute_module.time, "sleep", raising)
    with pytest.raises(stop):
        execute(tmp_path / "sweep", plan(recipe, ["seed=0,1,2"]), jobs=2, progress=Quiet(), launch=launch)
    assert [process.told for process in started] == [True, True]


def test_so_many_at_a_time_as_were_asked_for_and_threads_are_shared(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(execute_module.os, "cpu_count", lambda: 8)
    alive, seen = [], []

    class Slow(Done):
        def __init__(self):
            super().__init__(0)
            self.polls = 0
            alive.append(self)

        def poll(self):
            self.polls += 1
            if self.polls == 3:
                alive.remove(self)
                return 1
            return None

    def launch(words, log, threads):
        log.touch()
        process = Slow()
        seen.append((len(alive), threads))
        return process

    execute(tmp_path / "sweep", plan(recipe, ["seed=0,1,2,3"]), jobs=3, progress=Quiet(), launch=launch)
    assert max(count for count, _ in seen) == 3
    assert {threads for _, threads in seen} == {2}


def test_another_recipe_under_a_known_name_is_refused(recipe, tmp_path):
    folder = tmp_path / "sweep"
    execute(folder, plan(recipe, ["seed=0"]), progress=Quiet(), launch=Inline())
    with pytest.raises(ValueError, match="has begun with another recipe"):
        execute(folder, plan(recipe, ["seed=0"], ["training.steps=2"]), progress=Quiet(), launch=Inline())
    changed = plan(recipe, ["seed=0,1"], ["training.steps=2"])[1:]  # one that has not begun may change
    execute(folder, changed, progress=Quiet(), launch=Inline(broken=["seed-1"]))
    execute(folder, plan(recipe, ["seed=1"]), progress=Quiet(), launch=Inline())
    assert yaml.safe_load((folder / "seed-1" / "recipe.yaml").read_text())["training"]["steps"] == 1


def test_folders_of_something_else_are_left_alone(recipe, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    for folder in (tmp_path / "full", tmp_path / "full" / "letter.txt"):
        with pytest.raises(ValueError, match="choose another --out"):
            execute(folder, plan(recipe), progress=Quiet(), launch=Inline())
    assert {path.name for path in (tmp_path / "full").iterdir()} <= {"letter.txt", ".lock"}


def test_no_jobs_are_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match="--jobs 0"):
        execute(tmp_path / "sweep", plan(recipe), jobs=0, progress=Quiet())
    assert not (tmp_path / "sweep").exists()


def test_nothing_is_run_when_a_point_is_wrong(command, world, tmp_path):
    source = world.write(tmp_path / "recipe.yaml", method={"name": "fedavg"}, **SMALL)
    done = command("sweep", source, "--grid", "method=fedavg,fedavk", "--out", tmp_path / "sweep")
    assert (done.code, done.out) == (2, "")
    assert "did you mean 'fedavg'?" in done.err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_the_command_with_processes_of_its_own(command, world, tmp_path, monkeypatch):
    """As the help says: several grids after one option, two jobs; one finds its folder occupied, so it fails; compare reads the sweep."""
    monkeypatch.setattr(execute_module, "POLL", 0.2)
    source, folder = world.write(tmp_path / "recipe.yaml", method={"name": "fedavg"}, **SMALL), tmp_path / "sweep"
    (folder / "fedavg_seed-1").mkdir(parents=True)
    (folder / "fedavg_seed-1" / "stray.txt").touch()
    (folder / "sweep.json").write_text(json.dumps({"schema": 1, "points": []}))
    done = command("sweep", source, "--grid", "method=fedavg", "seed=0,1", "--jobs", "2", "--out", folder, "--set", "training.steps=2")
    assert done.code == 2
    assert "1 of 2 runs finished" in done.out
    assert "mean ± std" in done.out
    assert re.search(r"fedavg_seed-1: .*exists and is never overwritten", done.err)
    assert "start them again with: fedgraft sweep" in done.err
    assert "sweep      0/2" in done.err
    assert Record.load(folder / "fedavg_seed-0").recipe["training"]["steps"] == 2
    compared = json.loads(command("compare", folder, "--json").out)
    assert [run["folder"] for run in compared["runs"]] == [str(folder / "fedavg_seed-0")]
    assert compared["over_seeds"][0]["rows"][0]["seeds"] == [0]
