"""The commands with real SuperLinks and SuperNodes on loopback, over TLS with node keys, as processes of their own."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from fedgraft import runner
from fedgraft.deployment import federation as fed
from fedgraft.deployment import job, keys
from fedgraft.deployment.submission import carry_out
from fedgraft.report.progress import Quiet
from tests.deployment.conftest import wait_for
from tests.deployment.places import PATIENCE, SITES, SMALL, Place, state
from tests.run.world import World


@pytest.fixture
def place(tmp_path: Path, world: World) -> Iterator[Callable[..., Place]]:
    made: list[Place] = []

    def make(*sites: str) -> Place:
        made.append(Place(tmp_path, world, *sites))
        return made[-1]

    yield make
    for one in made:
        assert one.stop() == []


@pytest.fixture
def recipe(world: World, tmp_path: Path) -> Path:
    """A run over the two sites' rows, in process."""
    rows = tmp_path / "all"
    rows.mkdir()
    for site in SITES:
        shutil.copy(world.data / f"{site}.jsonl", rows)
    return world.write(tmp_path / "recipe.yaml", **SMALL, data={"path": str(rows)})


def test_two_sites_over_tls_learn_what_one_process_does(place, recipe, tmp_path):
    here = place(*SITES)
    coordinator = here.coordinator()
    sites = [here.site(name) for name in SITES]
    for site in sites:
        site.wait_to_say("ready")
    run = here.run(recipe, "far")
    runner.run(recipe, out=tmp_path / "near")
    assert run.ended() == 0, run.said
    assert state(tmp_path / "far") == state(tmp_path / "near")
    assert re.search(r"fedavg: 2 rounds", run.said)
    assert not list((tmp_path / "far").rglob("memory-*"))  # personal state stays at the sites
    assert {len(list((tmp_path / name).rglob("memory-*"))) > 0 for name in SITES} == {True}
    assert "site garden is online" in coordinator.said
    for one in (*sites, coordinator):
        family = one.family()
        assert family
        one.process.send_signal(signal.SIGTERM)
        assert one.ended() == 143
        assert psutil.wait_procs(family, timeout=10)[1] == []


@pytest.mark.deploy
def test_a_stopped_run_and_a_killed_coordinator_cost_nothing(place, recipe, tmp_path):
    """The run is stopped in round 2 and resumed; in round 3 the coordinator is killed with all that hangs on it."""
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    values["federation"]["rounds"] = 4
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    here, rounds = place(*SITES), tmp_path / "far" / "rounds.jsonl"
    coordinator = here.coordinator()
    for name in SITES:
        here.site(name)
    run = here.run(recipe, "far")
    wait_for(lambda: rounds.exists() and rounds.read_bytes().count(b"\n") >= 1, PATIENCE)
    run.process.send_signal(signal.SIGINT)
    assert run.ended() == 130, run.said
    assert "continue with: fedgraft resume" in run.said
    done = rounds.read_bytes().count(b"\n")
    assert done < 4
    again = here.start("again", "resume", tmp_path / "far")
    wait_for(lambda: rounds.read_bytes().count(b"\n") > done or again.process.poll() is not None, PATIENCE)
    family = coordinator.family()
    coordinator.process.kill()
    assert psutil.wait_procs(family, timeout=60)[1] == []
    assert again.ended() == 2, again.said
    coordinator.ended()
    here.coordinator()
    last = here.start("last", "resume", tmp_path / "far")
    assert last.ended() == 0, last.said
    runner.run(recipe, out=tmp_path / "near")
    assert state(tmp_path / "far") == state(tmp_path / "near")


@pytest.mark.deploy
def test_strangers_are_kept_out(place, tmp_path):
    here = place(*SITES)
    coordinator = here.coordinator()
    own = (tmp_path / "harbour" / "node.key").read_bytes()
    (tmp_path / "harbour" / "node.key").unlink()
    keys.make_node_key(tmp_path / "harbour" / "node.key", "a stranger")
    stranger = here.site("harbour")
    assert stranger.ended() == 2
    assert "does not know this site's key" in stranger.said
    (tmp_path / "harbour" / "node.key").write_bytes(own)
    (tmp_path / "garden" / "ca.pem").unlink()
    keys.make_authority(tmp_path / "other", "others")
    shutil.copy(tmp_path / "other" / "ca.pem", tmp_path / "garden")
    deceived = here.site("garden")
    assert deceived.ended() == 2
    assert "is not this federation's coordinator" in deceived.said
    known = here.site("harbour")
    coordinator.wait_to_say("site harbour is online")
    assert here.start("removal", "federation", "remove-site", here.fed, "harbour").ended() == 0
    coordinator.wait_to_say("site harbour is shut out")
    assert known.ended() == 2
    assert "does not know this site's key" in known.said
    status = here.start("status", "federation", "status", here.fed, "--json")
    assert status.ended() == 0
    found = json.loads(status.said)
    assert (found["process"], [site["site"] for site in found["sites"]]) == (coordinator.process.pid, ["garden"])
    assert here.start("stop", "federation", "stop", here.fed).ended() == 0
    assert coordinator.ended() == 143


@pytest.mark.deploy
@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own, while it makes the bundle
def test_code_that_comes_with_a_run_is_not_run_at_a_site(place, world, tmp_path):
    """Each side of the bundle would leave a mark when it is imported; the coordinator's does, which shows that the mark would be seen."""
    here = place("garden")
    here.coordinator()
    here.site("garden").wait_to_say("ready")
    recipe = world.recipe(**SMALL, engine={"name": "flower", "clients": 1}, data={"path": str(tmp_path / "garden" / "rows")})
    app = job.bundle()
    for side in ("server", "client"):
        app[f"fedgraft_{side}.py"] += f"from pathlib import Path\nPath({str(tmp_path / side)!r}).touch()\n"
    federation = fed.find(here.fed)
    carry_out(federation, job.new(federation.folder, tmp_path / "run", recipe), Quiet(), app)
    assert (tmp_path / "run" / "digest.txt").exists()
    assert (tmp_path / "server").exists()
    assert not (tmp_path / "client").exists()
