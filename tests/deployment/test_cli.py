"""What the commands say and refuse, without a SuperLink."""

from __future__ import annotations

import json

import pytest

from fedgraft.deployment import keys
from tests.run.conftest import command  # noqa: F401  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in Click:DeprecationWarning")


@pytest.fixture
def made(command, tmp_path):  # noqa: F811
    assert command("federation", "init", tmp_path / "fed", "--host", "a.example.org", "--site", "north").code == 0
    return tmp_path / "fed"


def test_status_without_a_coordinator(command, made):  # noqa: F811
    found = json.loads(command("federation", "status", made, "--json").out)
    assert found["process"] is None
    assert found["sites"] == [{"site": "north", "state": "not known while no coordinator runs"}]
    assert 700 < found["certificate_days"] <= 730
    assert "No coordinator ran here" in command("federation", "stop", made).out


def test_a_bundle_with_the_key_and_one_without(command, made, tmp_path):  # noqa: F811
    (tmp_path / "node.pub").write_bytes(keys.make_node_key(tmp_path / "node.key", "south"))
    assert "it holds the site's key" in command("federation", "add-site", made, "east").out
    assert "its key is there already" in command("federation", "add-site", made, "south", "--public-key", tmp_path / "node.pub").out
    assert command("federation", "remove-site", made, "east").code == 0
    assert sorted(path.stem for path in (made / "sites").iterdir()) == ["north", "south"]


def test_a_new_name_is_to_be_told_to_sites(command, made):  # noqa: F811
    assert "set address to b.example.org:9092" in command("federation", "renew", made, "--host", "b.example.org").out
    assert "set address" not in command("federation", "renew", made).out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "demo", "--on", "fed"], "no coordinator runs on this machine; start it with: fedgraft coordinator"),
        (["run", "demo", "--on", "fed", "--dry-run"], "--dry-run: rehearses on this machine's rows"),
        (["run", "demo", "--on", "nowhere"], "nowhere: no federation there"),
        (["coordinator", "nowhere"], "nowhere: no federation there"),
        (["federation", "init", "x", "--host", "a.example.org", "--insecure"], "only 127.0.0.1 is allowed"),
        (["site", "--policy", "north/site.yaml"], "coordinator.yaml: missing"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(command, made, tmp_path, monkeypatch, words, says):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (made / "bundles" / "north").rename(tmp_path / "north")
    (tmp_path / "north" / "coordinator.yaml").unlink()
    done = command(*words)
    assert (done.code, says in done.err) == (2, True), done.err


def test_a_site_without_its_key_does_not_start(command, made):  # noqa: F811
    bundle = made / "bundles" / "north"
    (bundle / "node.key").unlink()
    done = command("site", "--policy", bundle / "site.yaml")
    assert (done.code, "node.key: no such key" in done.err) == (2, True), done.err
