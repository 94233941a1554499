"""Frames survive bytes and Flower's records; damage is found and named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from fedgraft.bundle import Bundle
from fedgraft.engine import wire
from fedgraft.engine.wire import Frame
from fedgraft.tree import equal
from tests.engine.conftest import carried

JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.text(), lambda part: some.lists(part, max_size=3), max_leaves=5
)
FRAMES = some.builds(Frame, kind=some.text(), facts=some.dictionaries(some.text(), JSON, max_size=3), content=some.binary(max_size=50))


@given(FRAMES)
def test_both_ways_give_the_frame_back(frame):
    assert Frame.decode(frame.encode()) == frame
    assert Frame.of_records(frame.records()) == frame


def test_a_message_of_flowers_own_carries_bf16_and_empty_bundles(identity):
    from flwr.app import Message

    leaves = {"layers.0.attention.q.A": torch.tensor([[1.5, -0.1]], dtype=torch.bfloat16), "b": torch.zeros(0, 3)}
    for trees in ({"shared": leaves}, {}):
        frame = Frame(kind="reply", facts={"client": "ada"}, content=Bundle(trees=trees).encode())
        back = Frame.of_records(carried(Message(frame.records(), 7, "query")).content)
        assert back == frame
        assert Bundle.decode(back.content).trees.keys() == trees.keys()
        assert equal(Bundle.decode(back.content).tree("shared"), trees.get("shared", {}))


@given(some.data())
def test_any_change_of_the_head_or_the_length_is_found(data):
    raw = Frame(kind="ask", facts={"client": "ada", "asked": 3}, content=b"content").encode()
    head = len(raw) - len(b"content")
    at = data.draw(some.integers(0, head - 1))
    changed = raw[:at] + bytes([raw[at] ^ data.draw(some.integers(1, 255))]) + raw[at + 1 :]
    short = raw[: data.draw(some.integers(0, len(raw) - 1))]
    for bad in (changed, short, raw + b"!"):
        try:
            found = Frame.decode(bad, "the reply of client 'ada'")
        except ValueError as error:
            assert str(error).startswith("the reply of client 'ada': damaged or not written by fedgraft")  # noqa: PT017
        else:  # JSON says the same with other blanks or escapes
            assert bad is changed
            assert found == Frame.decode(raw)


def test_records_of_somebody_else_are_refused():
    from flwr.app import ConfigRecord, RecordDict

    for records in (RecordDict(), RecordDict({"head": ConfigRecord({"json": "[]"})}), RecordDict({"head": ConfigRecord({"x": 1})})):
        with pytest.raises(ValueError, match="node 7: damaged or not written by fedgraft"):
            Frame.of_records(records, "node 7")


def test_a_newer_schema_is_refused(monkeypatch):
    monkeypatch.setattr(wire, "SCHEMA", 2)
    newer = Frame(kind="ask").encode()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"node 7: written by a newer fedgraft \(schema 2, this one reads up to 1\); upgrade"):
        Frame.decode(newer, "node 7")
