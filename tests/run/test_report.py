"""The page in a run's folder, whatever became of the run, and the commands that write one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedgraft.report import html
from fedgraft.report.html import run_page
from fedgraft.report.record import Record
from fedgraft.runner import run
from fedgraft.session import Session
from fedgraft.trouble import Stopped
from tests.run.test_folder import QUICK, StopAt

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in Click:DeprecationWarning")


def test_a_finished_run_leaves_the_page_of_its_record(finished):
    page = (finished.folder / "report.html").read_text(encoding="utf-8")
    assert page == run_page(Record.load(finished.folder))
    for client, models in finished.results.items():
        assert client in page
        assert f"{models['personal']['gate_mean'][0][0]:.3f}" in page
    assert 'class="note missing"' not in page


@pytest.mark.parametrize(("phase", "step", "state"), [("selection", 2, "before its first round"), ("training", 5, "before its end")])
def test_a_stopped_run_leaves_the_page_of_what_is_there(world, tmp_path, phase, step, state):
    with pytest.raises(Stopped):
        run(world.recipe(), out=tmp_path / "out", progress=StopAt(phase, step))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"stopped {state}" in page
    assert "fedgraft resume ." in page
    assert "bakery" in page


def test_a_run_that_failed_leaves_one_too_and_its_error_is_the_one_told(world, tmp_path, monkeypatch):
    def failing(*_):
        raise ValueError("client 'garden' is broken")

    monkeypatch.setattr(Session, "_round", failing)
    with pytest.raises(ValueError, match="client 'garden' is broken"):
        run(world.recipe(**QUICK), out=tmp_path / "out")
    assert "stopped before its first round" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("error", "told"), [(RuntimeError("no template"), "no template"), (KeyboardInterrupt(), "KeyboardInterrupt")])
def test_a_page_that_fails_neither_stops_a_run_nor_hides_how_it_ended(world, tmp_path, monkeypatch, caplog, error, told):
    def failing(record):
        raise error

    monkeypatch.setattr(html, "run_page", failing)
    assert run(world.recipe(**QUICK), out=tmp_path / "whole").finished
    with pytest.raises(Stopped) as stopped:
        run(world.recipe(**QUICK), out=tmp_path / "half", progress=StopAt("training", 1))
    assert stopped.value.folder == tmp_path / "half"
    assert caplog.text.count(f"report.html was not written ({told})") == 2


def test_report_writes_into_the_folder_and_says_where(command, finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    done = command("report", folder)
    assert done == (0, f"{folder / 'report.html'}\n", "")
    assert (folder / "report.html").read_bytes() == before  # and an older one is replaced
    assert command("report", folder, "--out", tmp_path / "deep" / "page.html").out == f"{tmp_path / 'deep' / 'page.html'}\n"
    assert (tmp_path / "deep" / "page.html").read_bytes() == before


def test_report_of_several_runs_compares_them_finished_or_not(command, finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished.folder, tmp_path / "half")
    (folder / "results.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert command("report", finished.folder, folder).out == "comparison.html\n"
    page = Path("comparison.html").read_text(encoding="utf-8")
    assert "2 runs compared" in page
    assert f"fedgraft resume {folder}" in page


def test_somebodys_file_is_not_overwritten(command, finished, tmp_path):
    letter = tmp_path / "letter.html"
    letter.write_text("mine")
    for words in (["report", finished.folder, "--out", letter], ["compare", finished.folder, "--html", letter]):
        done = command(*words)
        assert (done.code, done.out) == (2, "")
        assert "letter.html: exists and is no report of fedgraft" in done.err
    assert letter.read_text() == "mine"


def test_compare_writes_a_page_beside_its_tables(command, finished, tmp_path):
    done = command("compare", finished.folder, "--html", tmp_path / "page.html")
    assert done.code == 0
    assert done.out.endswith(f"page in {tmp_path / 'page.html'}\n")
    again = command("compare", finished.folder, "--html", tmp_path / "page.html", "--json")
    assert json.loads(again.out)["runs"][0]["digest"] == finished.digest
    assert "1 run compared" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "told"), [(["report"], "FOLDERS"), (["report", "nowhere"], "nowhere: not a run folder"), (["report", "--help"], "Usage")]
)
def test_wrong_usage_is_told(command, words, told):
    done = command(*words)
    assert done.code == (0 if "--help" in words else 2)
    assert told in done.out + done.err
