"""`fedgraft watch` on real runs."""

from __future__ import annotations

import time

import pytest

from fedgraft.report.now import FILE
from fedgraft.report.progress import Quiet
from fedgraft.report.watching import Watched
from fedgraft.runner import resume, run
from fedgraft.trouble import Stopped
from tests.run.world import contents

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in Click:DeprecationWarning")
QUICK = {"method": {"name": "fedavg"}, "federation": {"rounds": 2}, "training": {"steps": 1}}
QUICK["evaluation"] = {"generate": False, "models": ["base", "personal"], "rows": 1, "task_rows": 2, "tasks": ["arc_easy_sample"]}


class Looking(Quiet):
    """Looks at the run from outside whenever a step is done; stops it at the wanted one."""

    def __init__(self, watched, stop_at=None):
        self.watched, self.stop_at, self.seen = watched, stop_at, []

    def step(self, note=""):
        self.seen.append(self.watched.look().state)
        if len(self.seen) == self.stop_at:
            raise KeyboardInterrupt


def test_a_finished_run_is_shown_and_untouched(command, finished):
    before = contents(finished.folder)
    done = command("watch", finished.folder)
    assert (done.code, done.err) == (0, "")
    for words in ("flex", "finished", "3/3", "response loss (nats/token): base", "garden"):
        assert words in done.out
    assert contents(finished.folder) == before
    assert FILE not in before


def test_a_run_is_seen_from_loading_to_its_end_through_a_stop(world, tmp_path, command):
    folder = tmp_path / "out"
    watched = Watched(folder)
    progress = Looking(watched, stop_at=5)
    with pytest.raises(Stopped):
        run(world.recipe(**QUICK), out=folder, progress=progress)
    assert progress.seen == ["waiting", "waiting", "running", "running", "running"]
    assert watched.look().state == "stopped"
    assert f"stopped; continue with: fedgraft resume {folder}" in command("watch", folder, "--once").out
    progress = Looking(watched)
    resume(folder, progress=progress)
    assert progress.seen[2:] == ["running"] * (len(progress.seen) - 2)
    view = watched.look()
    assert (view.state, view.done) == ("finished", 2)
    assert view.results["arc_easy_sample: accuracy"].keys() == {"base", "personal"}


def test_nothing_there_is_an_error_where_it_cannot_wait(command, tmp_path):
    done = command("watch", tmp_path / "nowhere", "--once")
    assert (done.code, done.out) == (2, "")
    assert "nothing there yet" in done.err


@pytest.mark.parametrize("there", [True, False])
def test_in_a_terminal_it_follows_until_the_end_or_ctrl_c(command, finished, tmp_path, monkeypatch, there):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes anything for a terminal
    done = command("watch", finished.folder if there else tmp_path / "nowhere")
    assert (done.code, done.err) == (0, "")
    assert ("finished" if there else "waiting for") in done.out


def test_a_recorder_that_is_not_installed_stops_before_anything_is_written(world, tmp_path, monkeypatch):
    monkeypatch.setattr("fedgraft.report.recording.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'fedgraft\[track\]'"):
        run(world.recipe(**QUICK, record={"to": ["mlflow"]}), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tasks_that_are_not_there_stop_before_anything_is_written(world, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.jsonl: no such file"):
        run(world.recipe(**{**QUICK, "evaluation": {"tasks": ["nowhere.jsonl"]}}), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
