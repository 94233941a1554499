"""The cost of a run in its folder: told, and of no account to anything else."""

from __future__ import annotations

import shutil

import pytest

from fedgraft.report import spending
from fedgraft.report.record import Record
from fedgraft.runner import resume, run
from fedgraft.trouble import Stopped
from tests.run.test_folder import QUICK, StopAt


def test_a_run_tells_what_it_is_made_of_and_what_it_took(finished):
    account, sessions = (finished.spending[part] for part in ("account", "sessions"))
    assert account["shared"] + account["personal"] == account["trained"] < account["parameters"]
    assert account["flops_base"] + account["flops_adapters"] + account["flops_graft"] == account["flops_grafted"]
    assert [(one["rounds"], one["finished"]) for one in sessions] == [(len(finished.rounds), True)]
    assert list(sessions[0]["seconds"]) == ["loading", "selection", "training", "evaluation"]


def test_a_run_taken_up_again_has_a_session_more_and_the_same_digest(world, tmp_path, finished):
    with pytest.raises(Stopped):
        run(world.recipe(), out=tmp_path / "out", progress=StopAt("training", 5))
    record = resume(tmp_path / "out")
    first, second = record.spending["sessions"]
    assert not first["finished"]
    assert "evaluation" not in first["seconds"]
    assert second["finished"]
    assert record.digest == finished.digest
    assert "session 2, to round" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_run_from_before_costs_were_kept_is_read_and_resumed(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    (folder / "cost.json").unlink()
    assert Record.load(folder).spending == {}
    assert resume(folder).digest == finished.digest


def test_a_cost_that_cannot_be_written_ends_no_run(world, tmp_path, monkeypatch, caplog):
    def failing(*_):
        raise OSError("no space left")

    monkeypatch.setattr(spending, "write_document", failing)
    record = run(world.recipe(**QUICK), out=tmp_path / "out")
    assert record.finished
    assert not (tmp_path / "out" / "cost.json").exists()
    assert "cost.json was not written (no space left)" in caplog.text
    assert "was not recorded with this run" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
