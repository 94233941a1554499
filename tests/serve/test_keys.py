"""Files of keys, and the command that makes and reads them."""

from __future__ import annotations

import json
import os

import pytest

from fedgraft.serve.keys import EVERYTHING, make_keys, read_keys
from fedgraft.serve.metrics import Metrics
from fedgraft.serve.server import opened

NAMES = ["base", "shared", "bakery", "garden"]


def test_a_key_opens_its_client_s_models_alone(tmp_path):
    path = tmp_path / "new" / "keys.json"
    make_keys(path, NAMES)
    assert os.stat(path).st_mode & 0o077 == 0
    entries = json.loads(path.read_text())["keys"]
    assert {entry["name"]: entry["models"] for entry in entries} == {
        "operator": [EVERYTHING],
        "bakery": ["bakery", "base", "shared"],
        "garden": ["garden", "base", "shared"],
    }
    ring = read_keys(path, NAMES)
    for entry in entries:
        models = NAMES if entry["models"] == [EVERYTHING] else entry["models"]
        assert (ring.models(entry["key"]), ring.operates(entry["key"])) == (frozenset(models), entry["name"] == "operator")
    assert ring.models("fg-" + "x" * 40) is None
    with pytest.raises(ValueError, match="never overwritten"):
        make_keys(path, NAMES)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ([], "no list of keys"),
        ({}, "no list of keys"),
        ([{"key": "short", "models": ["base"]}], r"keys\[0\]: needs a key of at least 16"),
        ([{"key": "x" * 20, "models": "base"}], r"keys\[0\]: needs"),
        ([{"key": "x" * 20, "models": ["gardn"]}], r"keys\[0\]: no model 'gardn' is served"),
        ([{"key": "x" * 20, "models": ["base"]}, {"key": "x" * 20, "models": ["garden"]}], r"keys\[1\]: its key stands in the file twice"),
    ],
)
def test_damaged_files_are_refused(tmp_path, keys, told):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"schema": 1, "keys": keys}))
    path.chmod(0o600)
    with pytest.raises(ValueError, match=told):
        read_keys(path, NAMES)


def test_files_that_others_can_read_or_that_are_not_there(tmp_path):
    path = tmp_path / "keys.json"
    with pytest.raises(ValueError, match="make one with: fedgraft serve RUN --make-keys"):
        read_keys(path, NAMES)
    make_keys(path, NAMES)
    path.chmod(0o644)
    with pytest.raises(ValueError, match=r"chmod 600 .*keys\.json"):
        read_keys(path, NAMES)


def test_the_command_makes_keys_and_refuses_to_serve_the_world_without(trained, command, tmp_path):
    folder, path = trained("flex").folder, tmp_path / "keys.json"
    done = command("serve", folder, "--make-keys", path)
    assert (done.code, done.out) == (0, f"{path}\n")
    assert len(json.loads(path.read_text())["keys"]) == 4
    done = command("serve", folder, "--host", "0.0.0.0")
    assert (done.code, "whoever reaches it could ask every client's model" in done.err) == (2, True)
    with opened("127.0.0.1", 0, keys=False) as taken:
        done = command("serve", folder, "--port", taken.getsockname()[1])
    assert (done.code, "Address already in use" in done.err) == (2, True)
    assert command("serve", tmp_path / "nowhere", "--port", "0").code == 2


def test_metrics_are_prometheus_text():
    metrics = Metrics()
    metrics.add("requests_total", model='a "b"\\\n', status="200")
    metrics.add("requests_total", 2, model="c", status="404")
    metrics.watch("waiting", lambda: 3)
    lines = metrics.text().splitlines()
    assert r'fedgraft_requests_total{model="a \"b\"\\\n",status="200"} 1' in lines
    assert 'fedgraft_requests_total{model="c",status="404"} 2' in lines
    assert lines[lines.index("# TYPE fedgraft_waiting gauge") + 1] == "fedgraft_waiting 3"
    assert float(next(line for line in lines if line.startswith("fedgraft_resident_bytes")).split()[1]) > 1e7
