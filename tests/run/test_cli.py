"""The command line: what goes to which stream, what it exits with, what a person and what a program reads."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from fedgraft import __version__, runner
from fedgraft.report.progress import Quiet
from fedgraft.report.record import Record
from fedgraft.runner import run
from tests.run.conftest import ENVIRONMENT, ROOT, cli
from tests.run.world import contents

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in Click:DeprecationWarning")
SMALL = ["federation.rounds=1", "training.steps=1", "evaluation.generate=false", "method.name=fedavg", "evaluation.rows=1"]
PHASES = {"loading", "selection", "training", "evaluation"}


@pytest.fixture
def recipe(world, tmp_path):
    return world.write(tmp_path / "recipe.yaml", selection=None)


@pytest.fixture(scope="session")
def fedavg(world, tmp_path_factory):
    small = {"federation": {"rounds": 1}, "evaluation": {"generate_rows": 2}}
    return run(world.recipe(method={"name": "fedavg"}, **small), out=tmp_path_factory.mktemp("finished") / "fedavg")


def settings():
    return [word for assignment in SMALL for word in ("--set", assignment)]


def test_run_prints_tables_on_stdout_and_progress_as_lines_on_stderr(command, recipe, tmp_path):
    done = command("run", recipe, "--out", tmp_path / "out", *settings())
    assert done.code == 0
    for words in ("response loss (nats/token)", "token accuracy", "bakery", "mean", "worst", f"results in {tmp_path / 'out'}"):
        assert words in done.out
    lines = [tuple(line.split()[:2]) for line in done.err.splitlines()]
    told = ["trains", "travels", "stays", "frozen"]
    assert list(dict.fromkeys(phase for phase, _ in lines)) == ["loading", *told, "training", "evaluation"]
    assert set(lines) >= {("training", "0/3"), ("training", "3/3"), ("evaluation", "3/3")}
    assert not set(re.findall(r"\w+", done.out)) & PHASES


def test_run_as_json_is_one_document_and_silence(command, recipe, tmp_path):
    done = command("run", recipe, "--out", tmp_path / "out", "--json", *settings())
    document, record = json.loads(done.out), Record.load(tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert document["digest"] == record.digest == (tmp_path / "out" / "digest.txt").read_text().strip()
    assert (document["method"], document["rounds"], document["folder"]) == ("fedavg", 1, str(tmp_path / "out"))
    loss = next(table for table in document["tables"] if table["figure"] == "loss")
    assert loss["columns"] == ["base", "trained", "personal"]
    assert loss["clients"]["garden"]["personal"] == record.results["garden"]["personal"]["loss"]
    assert loss["summary"].keys() == {"mean", "std", "worst", "gain over base"}


def test_a_setting_is_chosen_by_validation_rows_and_never_by_test_rows(command, world, fedavg, tmp_path):
    means = {}
    for lr in (1e-5, 1e-2):
        sections = {"federation": {"rounds": 1}, "training": {"lr": lr}, "method": {"name": "fedavg"}}
        tuned = world.recipe(**sections, evaluation={"split": "validation", "generate": False})
        losses = run(tuned, out=tmp_path / f"lr-{lr}").figures("personal", "loss")
        means[lr] = sum(losses.values()) / len(losses)
    best, tried = min(means, key=means.__getitem__), [tmp_path / f"lr-{lr}" for lr in means]
    done = command("compare", *tried, "--choose", "loss")
    assert done.code == 0
    assert f"fedavg: {{training.lr: {best}}}" in done.out
    document = json.loads(command("compare", *tried, "--choose", "loss", "--json").out)
    assert (document["split"], document["choices"][0]["settings"]) == ("validation", {"training.lr": best})
    refused = command("compare", *tried, fedavg.folder, "--choose", "loss")
    assert (refused.code, refused.out) == (2, "")
    assert f"{fedavg.folder}: was evaluated on test rows" in refused.err


def test_quiet_is_quiet(command, recipe, tmp_path):
    done = command("run", recipe, "--out", tmp_path / "out", "--quiet", *settings())
    assert (done.code, done.err) == (0, "")
    assert "response loss" in done.out


def test_run_without_a_recipe_is_the_demo_in_a_new_folder(command, monkeypatch):
    seen = {}

    def instead(recipe, *, out, overrides, progress):
        seen.update(recipe=recipe, out=out, overrides=overrides)
        raise ValueError("enough")

    monkeypatch.setattr(runner, "run", instead)
    assert command("run", "--set", "seed=1").code == 2
    assert seen == {"recipe": None, "out": None, "overrides": ["seed=1"]}


def test_an_occupied_folder_is_refused_and_untouched(command, recipe, finished):
    before = contents(finished.folder)
    done = command("run", recipe, "--out", finished.folder)
    assert (done.code, done.out) == (2, "")
    assert f"fedgraft resume {finished.folder}" in done.err
    assert contents(finished.folder) == before


def test_resume_extends(command, fedavg, tmp_path):
    folder = shutil.copytree(fedavg.folder, tmp_path / "copy")
    done = command("resume", folder, "--rounds", "2", "--json")
    assert done.code == 0
    assert json.loads(done.out)["rounds"] == 2
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["federation"]["rounds"] == 2
    refused = command("resume", folder, "--rounds", "1")
    assert (refused.code, refused.out) == (2, "")
    assert "2 rounds are done already" in refused.err


def test_ctrl_c_in_a_resume_names_its_folder(command, finished, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "resume", interrupted)
    done = command("resume", finished.folder)
    assert (done.code, done.out) == (130, "")
    assert f"Stopped. What was finished is saved; continue with: fedgraft resume {finished.folder}\n" in done.err


def test_ctrl_c_before_anything_was_begun_says_so(command, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    done = command("run")
    assert done.code == 130
    assert "Nothing was begun" in done.err


def test_compare_has_a_column_per_run_and_the_base(command, finished, fedavg):
    done = command("compare", finished.folder, fedavg.folder)
    assert (done.code, done.err) == (0, "")
    assert re.search(r"client\W+base\W+flex\W+fedavg\W", done.out)
    for client, model in (("harbour", "personal"), ("garden", "base")):
        assert f"{finished.results[client][model]['loss']:.3f}" in done.out
    assert "flex: 3 rounds in" in done.out
    assert "fedavg: 1 round in" in done.out


def test_compare_as_json(command, finished, fedavg, tmp_path):
    twin = shutil.copytree(finished.folder, tmp_path / "twin")
    done = command("compare", finished.folder, fedavg.folder, twin, "--json")
    document = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert [item["name"] for item in document["runs"]] == ["flex (flex)", "fedavg", "flex (twin)"]
    assert [item["digest"] for item in document["runs"]] == [finished.digest, fedavg.digest, finished.digest]
    assert {item["seed"] for item in document["runs"]} == {7}
    assert [table["columns"] for table in document["tables"]] == [["base", "flex (flex)", "fedavg", "flex (twin)"]] * 3
    rouge = document["tables"][2]
    assert rouge["figure"] == "rougeL"
    assert rouge["clients"]["bakery"]["fedavg"] == fedavg.results["bakery"]["personal"]["rougeL"]


def test_compare_takes_runs_that_differ_in_their_seed_together(command, finished, fedavg, tmp_path):
    """Copies under another seed: three of FLEx and three of FedAvg, so a test of two groups with no deviation."""
    folders = []
    for record in (finished, fedavg):
        for seed in range(3):
            folders.append(shutil.copytree(record.folder, tmp_path / f"{record.method}_seed-{seed}"))
            recipe = yaml.safe_load((folders[-1] / "recipe.yaml").read_text())
            (folders[-1] / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"seed": seed}))
    done = command("compare", *folders, "--baseline", "fedavg", "--html", tmp_path / "page.html")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"client\W+base\W+flex\W+fedavg\W", done.out)
    assert "response loss (nats/token); differences to fedavg" in done.out
    assert "same in every" in done.out
    assert "Holm" in done.out
    assert 'id="seeds"' in (tmp_path / "page.html").read_text()
    document = json.loads(command("compare", *folders, "--json").out)
    assert {run["group"] for run in document["runs"]} == {"flex", "fedavg"}
    assert [row["seeds"] for row in document["over_seeds"][0]["rows"]] == [[0, 1, 2]] * 2
    refused = command("compare", *folders, "--baseline", "fedavgg")
    assert (refused.code, refused.out) == (2, "")
    assert "did you mean 'fedavg'?" in refused.err


def test_compare_of_single_runs_shows_nothing_over_seeds(command, finished, fedavg):
    assert "Holm" not in command("compare", finished.folder, fedavg.folder).out


def test_many_runs_are_lines_with_their_summary(command, finished, tmp_path):
    """Eight columns are more than a terminal has room for."""
    folders = [shutil.copytree(finished.folder, tmp_path / f"copy{number}") for number in range(8)]
    done = command("compare", *folders)
    assert done.code == 0
    assert re.search(r"run\W+mean\W+std\W+worst\W", done.out)
    assert all(f"flex (copy{number})" in done.out for number in range(8))


def test_compare_refuses_a_sweep_without_a_finished_run(command, tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps({"schema": 1, "points": [{"name": "flex"}]}))
    done = command("compare", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "no run of this sweep is finished yet" in done.err


def test_compare_refuses_an_unfinished_run(command, finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    (folder / "results.json").unlink()
    done = command("compare", finished.folder, folder)
    assert (done.code, done.out) == (2, "")
    assert f"finish it with: fedgraft resume {folder}" in done.err.replace("\n", "")


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("methods", {"flex", "fedavg", "local"}),
        ("families", {"qwen2_moe", "olmoe", "mixtral"}),
        ("criteria", {"reconstruction", "gate_mass"}),
        ("datasets", {"dolly", "jsonl"}),
    ],
)
def test_lists(command, kind, some):
    done = command("list", kind, "--json")
    rows = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert all(row.keys() == {"name", "supported", "reason"} and row["reason"] for row in rows)
    assert some <= {row["name"] for row in rows if row["supported"] is True}
    assert len({row["name"] for row in rows}) == len(rows)
    drawn = command("list", kind)
    assert drawn.code == 0
    assert all(row["name"] in drawn.out for row in rows)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["list", "method"], "did you mean 'methods'?"),
        (["list"], "KIND"),
        (["compare"], "FOLDERS"),
        (["compare", "nowhere"], "nowhere: not a run folder"),
        (["resume", "nowhere"], "nowhere: not a run folder"),
        (["resume", "nowhere", "--rounds", "many"], "--rounds"),
        (["run", "--outt", "x"], "--outt"),
        (["run", "nowhere.yaml"], "nowhere.yaml: no such recipe file"),
        (["run", "--set", "training.lrr=1"], "did you mean 'lr'?"),
        (["run", "--set", "method.name=[x]"], "method.name"),
        (["fly"], "fly"),
    ],
)
def test_wrong_usage_exits_with_2_and_is_told_on_stderr(command, words, told):
    done = command(*words)
    assert done.code == 2
    assert done.out == ""
    assert told in done.err
    assert "Traceback" not in done.err


def test_debug_shows_the_traceback(command, capfd):
    with pytest.raises(ValueError, match="no such recipe"):
        command("--debug", "run", "nowhere.yaml")
    assert command("run", "nowhere.yaml").code == 2  # and only where asked


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_the_terminal_is_given_back_after_an_error(command, monkeypatch, error):
    """Bars hide the cursor until they are closed."""
    closed = []

    class Watched(Quiet):
        def close(self):
            closed.append(True)

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(cli.frame, "make_progress", lambda quiet, verbose: Watched())
    monkeypatch.setattr(runner, "run", failing)
    assert command("run").code in {2, 130}
    assert closed


def test_markup_in_an_error_is_printed_as_it_is(command):
    assert "[bold]x.yaml: no such recipe" in command("run", "[bold]x.yaml").err


def test_long_errors_are_not_folded(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert len(command("run", "x" * 200).err.splitlines()) == 1


def test_version_and_help(command):
    assert command("--version")[:2] == (0, f"fedgraft {__version__}\n")
    for words in (["--help"], ["run", "--help"], ["resume", "--help"], ["compare", "--help"], ["list", "--help"], ["sweep", "--help"]):
        done = command(*words)
        assert done.code == 0
        assert "Usage" in done.out
    assert {"run", "resume", "compare", "list"} <= set(re.findall(r"\w+", command("--help").out))


def test_the_module_is_the_command(tmp_path):
    words = [sys.executable, "-m", "fedgraft", "run", "nowhere.yaml"]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere.yaml: no such recipe file")
