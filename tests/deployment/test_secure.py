"""Masked sums over TLS, between sites that send nothing else; one of them is killed in the middle."""

from __future__ import annotations

import pytest
import yaml

from fedgraft import files, runner
from fedgraft.transforms.secure_aggregation.settings import KEYS, SHARES, TRAIN, UNMASK
from tests.deployment.conftest import wait_for
from tests.deployment.places import PATIENCE, SMALL, Place, state
from tests.run.world import CLIENTS

pytestmark = pytest.mark.deploy
MASKED = {**SMALL, "secure_aggregation": {"name": "secagg_plus"}}


def test_three_sites_have_a_sum_and_two_of_them_go_on(world, tmp_path):
    """The state is that of the run in process; when a site is gone, the others' masks with it are taken off by their shares of its key."""
    here = Place(tmp_path, world, *CLIENTS)
    try:
        here.coordinator()
        for name in CLIENTS:
            file = tmp_path / name / "site.yaml"
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
            file.write_text(yaml.safe_dump({**values, "policy": {"secure_aggregation": "required"}}), encoding="utf-8")
        sites = {name: here.site(name) for name in CLIENTS}
        recipe = world.recipe(**MASKED, engine={"name": "flower", "clients": 3, "deadline_seconds": 30})
        (tmp_path / "masked.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        run = here.run(tmp_path / "masked.yaml", "far")
        assert run.ended() == 0, run.said
        runner.run(world.recipe(**MASKED), out=tmp_path / "near")
        assert state(tmp_path / "far") == state(tmp_path / "near")
        for name in CLIENTS:
            lines = [line for line in files.read_lines(next((tmp_path / name).rglob("site.log.jsonl"))) if "question" in line]
            told = {question: [line for line in lines if line["question"] == question] for question in (KEYS, SHARES, TRAIN, UNMASK)}
            assert {question: len(asked) for question, asked in told.items()} == dict.fromkeys(told, 2)
            assert all(line["verdict"] == "answered" and line["trees"].keys() <= {"masked"} for line in lines)
            assert all(line["trees"] for line in told[TRAIN])
        recipe["federation"]["rounds"] = 4
        recipe["training"]["steps"] = 20
        (tmp_path / "longer.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        run = here.run(tmp_path / "longer.yaml", "without")
        rounds = tmp_path / "without" / "rounds.jsonl"
        wait_for(lambda: rounds.exists() and rounds.read_bytes().count(b"\n") >= 1, PATIENCE)
        family = [*sites["bakery"].family(), sites["bakery"].process]
        for process in family:
            process.kill()
        assert run.ended() in (0, 2), run.said  # it cannot evaluate a client that is gone
        lines = files.read_lines(rounds)
        assert len(lines) == 4
        assert any("bakery" in line.get("failed", {}) for line in lines)
        assert all({"garden", "harbour"} <= line["clients"].keys() and "unopened" not in line for line in lines)
    finally:
        here.stop()
