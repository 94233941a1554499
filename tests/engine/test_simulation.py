"""Flower's simulation on Ray: the same digests as in process, memories included. Ray starts slowly, so it runs on `-m deploy` alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fedgraft import hosting, runner
from fedgraft.engine import flower
from fedgraft.moe.load import load_base
from tests.engine.test_flower import CASES, Watch, timeless
from tests.run.conftest import ENVIRONMENT, ROOT

SECTIONS = {"federation": {"rounds": 2}, "training": {"optimizer_state": "kept"}}
DRIVER = """
import json, sys
from fedgraft import runner
from fedgraft.trouble import Stopped
from tests.engine.test_flower import Watch
for job in json.loads(sys.argv[1]):
    try:
        record = runner.run(job["recipe"], out=job["out"], progress=Watch(job["stop"])) if "recipe" in job else runner.resume(job["folder"])
        print(record.digest)
    except Stopped:
        print("stopped")
"""


def simulated(recipe):
    """One thread, as the tests in process."""
    return recipe | {"engine": {"name": "flower-simulation", "cpus": 1, "deadline_seconds": 120}}


def in_a_process(jobs) -> list[str]:
    """What each job ended with; apart, since Ray leaves threads and handlers behind."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER, json.dumps(jobs)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        check=False,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


@pytest.fixture
def fresh(light, monkeypatch):
    """The base as it lies on disk: weights mapped from a file are aligned otherwise than copied ones, which moves last digits."""
    monkeypatch.setattr(hosting, "load_base", load_base)


@pytest.mark.deploy
@pytest.mark.parametrize("case", ["flex", "fedavg", "scaffold", "hetlora"])
def test_a_simulation_is_the_run_in_process(place, tmp_path, fresh, case):
    recipe = place.recipe(case, **CASES[case] | SECTIONS)
    here = runner.run(recipe, out=tmp_path / "here")
    assert in_a_process([{"recipe": simulated(recipe), "out": str(tmp_path / "there"), "stop": 0}]) == [here.digest]
    assert timeless(runner.Record.load(tmp_path / "there")) == timeless(here)


@pytest.mark.deploy
def test_a_stopped_simulation_goes_on_bit_for_bit(place, tmp_path, fresh):
    recipe, there = place.recipe("scaffold", **SECTIONS), str(tmp_path / "there")
    here = runner.run(recipe, out=tmp_path / "here")
    jobs = [{"recipe": simulated(recipe), "out": there, "stop": 4}, {"folder": there}]
    assert in_a_process(jobs) == ["stopped", here.digest]


@pytest.mark.parametrize("missing", ["flwr", "ray"])
def test_what_is_not_installed_is_named_with_its_extra(place, tmp_path, monkeypatch, missing):
    find = flower.find_spec
    monkeypatch.setattr(flower, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(
        ValueError, match=rf"needs {missing}, which is not installed; pip install 'fedgraft\[flower\]', or set it to inprocess"
    ):
        runner.run(simulated(place.recipe("fedavg")), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_pooled_rows_are_refused_before_anything_starts(place, tmp_path):
    with pytest.raises(ValueError, match="'centralised' pools the clients' rows"):
        runner.run(simulated(place.recipe("centralised")), out=tmp_path / "run")


def test_a_deployment_is_not_started_by_a_plain_run(place, tmp_path):
    with pytest.raises(ValueError, match=r"engine\.name: 'flower' runs over sites elsewhere; start it with: fedgraft run RECIPE --on NAME"):
        runner.run(place.recipe("fedavg") | {"engine": {"name": "flower"}}, out=tmp_path / "run", progress=Watch())
