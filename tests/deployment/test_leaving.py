"""A site that leaves in the middle of a run, with real SuperLink and SuperNodes over TLS."""

from __future__ import annotations

import json

import psutil
import pytest
import yaml

from tests.deployment.conftest import wait_for
from tests.deployment.test_commands import PATIENCE, SITES, place, recipe  # noqa: F401  # fixtures
from tests.run.world import contents


@pytest.mark.deploy
def test_a_site_leaves_in_the_middle_of_a_run(place, recipe, tmp_path):  # noqa: F811
    """Its processes end, its memory stays with it, the run goes on with the other site, and can be merged again without it."""
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    values["federation"]["rounds"] = 6
    values["engine"] = {"name": "flower", "clients": 2, "keep_replies": True, "deadline_seconds": 600}
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    here, rounds, home = place(*SITES), tmp_path / "far" / "rounds.jsonl", tmp_path / "harbour"
    early = here.start("early", "site", "--policy", home / "site.yaml", "--leave")
    assert (early.ended(), "nothing was changed" in early.said) == (2, True), early.said
    coordinator = here.coordinator()
    garden, harbour = (here.site(name) for name in SITES)
    for site in (garden, harbour):
        site.wait_to_say("ready")
    family = harbour.family()
    run = here.run(recipe, "far")
    wait_for(lambda: (rounds.exists() and rounds.read_bytes().count(b"\n") >= 1) or run.process.poll() is not None, PATIENCE)
    leave = here.start("leave", "site", "--policy", home / "site.yaml", "--leave")
    assert leave.ended() == 0, leave.said
    assert "Site harbour has left the federation" in leave.said
    assert harbour.ended() == 0, harbour.said
    assert "has left the federation; everything is stopped" in harbour.said
    assert psutil.wait_procs(family, timeout=10)[1] == []
    assert list((home / "state" / "runs").rglob("memory-*.safetensors"))
    coordinator.wait_to_say("site harbour is shut out")
    assert run.ended() == 0, run.said
    lines = [json.loads(line) for line in rounds.read_bytes().splitlines()]
    since = next(line["round"] for line in lines if "left" in line)
    assert since >= 1
    assert [("harbour" in line["clients"], "left" in line) for line in lines] == [(True, False)] * since + [(False, True)] * (6 - since)
    assert json.loads((tmp_path / "far" / "results.json").read_bytes())["left"] == {"harbour": since}
    again = here.start("again", "site", "--policy", home / "site.yaml")
    assert (again.ended(), "this site has left the federation" in again.said) == (2, True), again.said
    longer = here.start("longer", "resume", tmp_path / "far", "--rounds", "7")
    assert longer.ended() == 0, longer.said
    forget = here.start("forget", "forget", tmp_path / "far", "--client", "harbour")
    assert forget.ended() == 0, forget.said
    made = tmp_path / "far-without-harbour"
    assert [path for path, content in contents(made).items() if path != "forgotten.json" and b"harbour" in content] == []
    last = here.start("last", "resume", made, "--rounds", "8")  # the federation goes on from there
    assert last.ended() == 0, last.said
    assert sorted(json.loads((made / "results.json").read_bytes())["clients"]) == ["garden"]
