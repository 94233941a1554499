"""Progress by way of a file arrives as it was told, in whatever pieces it is read."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from fedgraft.deployment.relay import Onlooker, Relay


class Heard:
    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, arguments))


def tell_all(progress):
    progress.begin("training", 3)
    progress.part("berlin", "round 1  berlin", 1, 4, 2.5, "steps")
    progress.step("größer")
    progress.warn("a\nb")
    progress.tell([("model", "demo")])


def test_everything_arrives_in_order(tmp_path):
    relay, heard = Relay(tmp_path / "x" / "events.jsonl"), Heard()
    tell_all(relay)
    relay.end("disk full")
    onlooker = Onlooker(tmp_path / "x" / "events.jsonl", heard)
    assert onlooker.ended is None
    onlooker.look()
    onlooker.look()
    direct = Heard()
    tell_all(direct)
    assert json.loads(json.dumps(heard.calls)) == json.loads(json.dumps(direct.calls))
    assert onlooker.ended == "disk full"


@given(cuts=st.lists(st.integers(0, 400), max_size=6))
def test_half_a_line_waits_for_its_other_half(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("relay")
    relay = Relay(folder / "whole")
    tell_all(relay)
    relay.end("")
    content, heard = (folder / "whole").read_bytes(), Heard()
    onlooker = Onlooker(folder / "piecewise", heard)
    onlooker.look()
    for cut in [*sorted(cuts), len(content)]:
        (folder / "piecewise").write_bytes(content[:cut])
        onlooker.look()
    assert [name for name, _ in heard.calls] == ["begin", "part", "step", "warn", "tell"]
    assert onlooker.ended == ""


def test_only_what_a_progress_has_is_passed_on(tmp_path):
    (tmp_path / "events").write_text('["close"]\n["__init__"]\n["step", "x"]\n', encoding="utf-8")
    heard = Heard()
    Onlooker(tmp_path / "events", heard).look()
    assert heard.calls == [("step", ("x",))]
