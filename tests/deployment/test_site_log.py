"""The log of a site: what it counts survives a restart, half a line does not."""

from __future__ import annotations

import pytest

from fedgraft import files
from fedgraft.bundle import Outline
from fedgraft.deployment.policy import Spent
from fedgraft.deployment.site_log import SiteLog, told


@pytest.fixture
def path(tmp_path):
    log = SiteLog(tmp_path / "site.log.jsonl")
    log.write("loaded", base="demo")
    log.write("answered", run="one", question="train", fingerprint="a", bytes=100)
    log.write("answered", run="one", question="train", fingerprint="a", bytes=100)
    log.write("answered", run="one", question="evaluate", fingerprint="b", bytes=10)
    log.write("refused", run="one", question="train", fingerprint="c", bytes_in=7)
    log.write("answered", run="two", question="train", fingerprint="d", bytes=1)
    assert log.spent("one") == Spent(total_bytes=211, rounds=frozenset({"a"}))
    return tmp_path / "site.log.jsonl"


def test_what_is_spent_survives_a_restart(path):
    log = SiteLog(path)
    assert log.spent("one") == Spent(total_bytes=211, rounds=frozenset({"a"}))
    assert log.spent("two").rounds == {"d"}
    assert log.spent("three") == Spent(total_bytes=211)


def test_half_a_line_is_dropped_and_the_next_one_is_whole(path):
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:30])
    log = SiteLog(path)
    assert path.read_bytes() == whole
    log.write("answered", run="two", question="train", fingerprint="e", bytes=1)
    assert len(files.read_lines(path)) == 7


def test_a_damaged_line_is_named(path):
    path.write_bytes(b"{]\n" + path.read_bytes())
    with pytest.raises(ValueError, match="line 1: damaged"):
        SiteLog(path)


def test_a_summary_of_a_reply():
    leaves = {"layers.0.attention.q.A": 16, "layers.1.attention.q.A": 16, "layers.1.own.attention.q.A": 8}
    assert told(Outline(trees={"shared": leaves, "none": {}}, facts={"loss": 1.0, "examples": 3})) == {
        "trees": {"shared": {"leaves": 3, "bytes": 40, "places": ["attention", "own"]}},
        "facts": ["examples", "loss"],
    }
