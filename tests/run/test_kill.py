"""A run that is killed anywhere, any number of times, ends with the same bits as one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedgraft import files
from fedgraft.bundle import Bundle
from tests.run.conftest import ENVIRONMENT, ROOT
from tests.run.world import World

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill -9")]
Driver = Callable[..., dict[str, Any]]
TRIALS = 20
TIMED = {"seconds", "bytes_up"}  # replies carry the seconds as digits, so their length varies with the time taken
LEAN = {
    "federation": {"clients_per_round": 2},
    "training": {"steps": 1},
    "evaluation": {"rows": 1, "generate": False, "models": ["trained", "personal"]},
}


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: untimed(inner) for name, inner in value.items() if name not in TIMED}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a run leaves that must not depend on where it was stopped."""
    exact = ("recipe.yaml", "selection.json", "digest.txt", "digest.json", "results.json", "state/state.safetensors")
    kept = {name: (folder / name).read_bytes() for name in exact if (folder / name).exists()}
    return kept | {"rounds": untimed(files.read_lines(folder / "rounds.jsonl")), "left": sorted(map(str, folder.rglob(".*.tmp")))}


def phase(folder: Path) -> str:
    """Where a run stands by its files."""
    if (folder / "results.json").exists():
        return "finished"
    state = folder / "state" / "state.safetensors"
    if not state.exists():
        return "selection"
    return "evaluation" if Bundle.load(state).facts["round"] == 3 else "training"


def go_on(driver: Driver, recipe: dict[str, Any], folder: Path, **kill: Any) -> dict[str, Any]:
    """What a user does with a folder found after a crash."""
    if (folder / "recipe.yaml").exists():
        return driver(folder=folder, **kill)
    return driver(recipe=recipe, out=folder, **kill)


def test_killed_at_random_moments(driver, world, tmp_path):
    rng, recipe = random.Random(1), world.recipe()
    whole = driver(recipe=recipe, out=tmp_path / "whole")
    assert whole["status"] == 0, whole["error"]
    wanted, reached = outcome(tmp_path / "whole"), []
    for number in range(TRIALS):
        folder = tmp_path / f"killed-{number}"
        ended = driver(recipe=recipe, out=folder, kill_after=(number + rng.random()) / TRIALS * whole["seconds"])
        reached.append(phase(folder))
        while ended["status"] != 0:
            assert ended["status"] == -signal.SIGKILL, ended["error"]
            again = rng.random() < 0.4
            ended = go_on(driver, recipe, folder, kill_after=rng.uniform(0, whole["seconds"]) if again else None)
        assert outcome(folder) == wanted, f"trial {number}, first killed in {reached[-1]}"
    assert len(set(reached)) > 1, "all kills fell into one phase"


@pytest.mark.parametrize("method", ["flex", "fedavg"])
def test_killed_before_every_change_on_disk(driver, world, tmp_path, method):
    recipe = world.recipe(method={"name": method}, **LEAN)
    whole = driver(recipe=recipe, out=tmp_path / "whole")
    assert whole["status"] == 0, whole["error"]
    written = {name.removeprefix("the rename to ").split("-0")[0] for name in whole["writes"]}
    parts = {"recipe.yaml", "environment.json", "state.safetensors", "a line of rounds.jsonl", "memory", "digest.txt", "results.json"}
    assert parts <= written
    assert "the removal of memory" in written
    wanted = outcome(tmp_path / "whole")
    for number, moment in enumerate(whole["writes"], start=1):
        folder = tmp_path / f"crash-{number}"
        first = driver(recipe=recipe, out=folder, crash_at=number)
        assert first["status"] == -signal.SIGKILL, (moment, first["error"])
        second = go_on(driver, recipe, folder, crash_at=1 + number % 7)
        assert second["status"] in (-signal.SIGKILL, 0), (moment, second["error"])
        last = go_on(driver, recipe, folder)
        assert last["status"] == 0, (moment, last["error"])
        assert outcome(folder) == wanted, f"killed before {moment}, then before change {1 + number % 7} of the resume"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_the_user_or_a_batch_system(driver: Driver, world: World, tmp_path: Path, number: int, code: int):
    rounds = 20
    sections = {"federation": {"rounds": rounds}, "evaluation": LEAN["evaluation"]}
    recipe, folder = world.recipe(**sections), tmp_path / "run"
    file = world.write(tmp_path / "recipe.yaml", **sections)
    words = [sys.executable, "-m", "fedgraft", "run", str(file), "--out", str(folder)]
    process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(files.read_lines(folder / "rounds.jsonl")) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert f"fedgraft resume {folder}" in err
    assert "Traceback" not in err
    assert out == ""
    assert 2 <= len(files.read_lines(folder / "rounds.jsonl")) < rounds
    assert driver(folder=folder)["status"] == 0
    assert driver(recipe=recipe, out=tmp_path / "whole")["status"] == 0
    assert outcome(folder) == outcome(tmp_path / "whole")
