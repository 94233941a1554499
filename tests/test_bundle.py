"""The codec: whatever goes in comes out, and what is damaged is refused."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import strategies as st

from fedgraft.bundle import SCHEMA, Bundle
from fedgraft.tree import equal, num_bytes
from tests.strategies import ADDRESSES, given, trees

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), inner, max_size=3),
    max_leaves=6,
)
BUNDLES = st.builds(
    lambda named, facts: Bundle(trees=named, facts=facts),
    st.dictionaries(st.sampled_from(["shared", "personal", "moments.exp_avg"]), trees(), max_size=3),
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), JSON, max_size=3),
)


@given(BUNDLES)
def test_round_trip_is_exact(bundle):
    again = Bundle.decode(bundle.encode())
    assert again.trees.keys() == bundle.trees.keys()  # empty trees too
    assert all(equal(again.tree(name), tree) for name, tree in bundle.trees.items())
    assert again.facts == bundle.facts
    assert again.digest() == bundle.digest()
    assert again.encode() == bundle.encode()  # byte for byte, so files of equal runs are equal


@given(BUNDLES)
def test_save_and_load_are_the_codec(tmp_path_factory, bundle):
    path = tmp_path_factory.mktemp("bundle") / "deep" / "x.safetensors"
    bundle.save(path)
    assert path.read_bytes() == bundle.encode()
    assert Bundle.load(path).digest() == bundle.digest()


def test_decoded_tensors_can_be_written_to():
    leaf = Bundle.decode(Bundle(trees={"t": {ADDRESSES[0]: torch.ones(2)}}).encode()).tree("t")[ADDRESSES[0]]
    assert leaf.add_(1).tolist() == [2, 2]


def test_views_and_shared_memory_are_stored_by_value():
    matrix = torch.arange(6.0).reshape(2, 3)
    leaves = {"row": matrix[1], "turned": matrix.T, "spread": matrix[:, :1].expand(2, 4), "whole": matrix, "grad": matrix.requires_grad_()}
    bundle = Bundle(trees={"one": leaves, "two": leaves})
    again = Bundle.decode(bundle.encode())
    assert equal(again.tree("one"), leaves)
    assert equal(again.tree("two"), leaves)


def test_absent_tree_is_empty_and_digest_ignores_facts_and_empty_trees():
    leaves = {"a": torch.ones(1)}
    bundle = Bundle(trees={"t": leaves}, facts={"seconds": 1.0})
    assert bundle.tree("other") == {}
    assert bundle.digest() == Bundle(trees={"t": leaves, "none": {}}, facts={"seconds": 2.0}).digest()
    assert bundle.digest() != Bundle(trees={"u": leaves}).digest()


@given(st.data())
def test_cut_content_is_refused_by_name(data):
    content = Bundle(trees={"t": {"a": torch.arange(5.0)}}, facts={"n": 1}).encode()
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    with pytest.raises(ValueError, match=r"^the reply: damaged or not written by fedgraft"):
        Bundle.decode(cut, "the reply")


def read(content):
    """The bundle, or what refused it."""
    try:
        return Bundle.decode(content, "the state")
    except ValueError as error:
        return str(error)


def test_every_flipped_bit_is_found_or_without_effect():
    """Flips in the padding of the header and in the name of the checksum change nothing that is read."""
    bundle = Bundle(trees={"t": {"a": torch.arange(5.0)}}, facts={"round": 3})
    content = bundle.encode()
    found = 0
    for place in range(len(content)):
        for bit in range(8):
            again = read(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            if isinstance(again, str):
                found += again.startswith("the state: ")
            else:
                assert equal(again.tree("t"), bundle.tree("t"))
                assert again.facts == bundle.facts
    assert found > 0.9 * 8 * len(content)


def test_flipped_tensor_bits_are_found():
    content = Bundle(trees={"t": {"a": torch.arange(5.0)}}).encode()
    for place in range(len(content) - 20, len(content)):
        with pytest.raises(ValueError, match=r"^the state: damaged .*checksum does not fit\); restore it from a copy, or start a new run"):
            Bundle.decode(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :], "the state")


@pytest.mark.parametrize(
    "content", [b"", b"not safetensors at all", struct.pack("<Q", 2**62), b"\x80\x04K\x01.", struct.pack("<Q", 2) + b"{}"]
)
def test_foreign_content_is_refused_by_name(tmp_path, content):
    path = tmp_path / "memory.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}: damaged or not written by fedgraft"):
        Bundle.load(path)


def test_a_newer_schema_is_refused_with_the_remedy():
    content = Bundle(trees={"t": {"a": torch.ones(1)}}).encode()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = {"fedgraft": json.dumps({"schema": SCHEMA + 1, "leaves": "laid out in a way unknown here"})}
    changed = json.dumps(header).encode()
    with pytest.raises(ValueError, match=rf"x: written by a newer fedgraft \(schema {SCHEMA + 1}, .* up to {SCHEMA}\); upgrade fedgraft"):
        Bundle.decode(struct.pack("<Q", len(changed)) + changed + content[8 + size :], "x")


def test_a_missing_file_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Bundle.load(tmp_path / "none")


@given(BUNDLES)
def test_the_outline_is_what_is_there(bundle):
    outline = Bundle.outline(bundle.encode())
    assert outline.facts == bundle.facts
    assert outline.trees == {name: {key: num_bytes({key: leaf}) for key, leaf in tree.items()} for name, tree in bundle.trees.items()}


def smuggled(change):
    """An encoded bundle whose header is altered."""
    content = Bundle(trees={"shared": {"layers.0.attention.q.A": torch.ones(2)}}, facts={"loss": 1.0}).encode()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    rest = change(header, json.loads(header["__metadata__"]["fedgraft"]), content[8 + size :])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def with_second_text(header, inner, rest):
    header["__metadata__"]["note"] = "a row"
    return rest


def with_second_header(header, inner, rest):
    header["__metadata__"]["fedgraft"] = json.dumps(inner | {"note": "a row"})
    return rest


def with_a_gap(header, inner, rest):
    header["shared/layers.0.attention.q.A"]["data_offsets"] = [4, 12]
    return b"row " + rest


@pytest.mark.parametrize(
    "change", [with_second_text, with_second_header, with_a_gap, lambda header, inner, rest: rest + b"a row", lambda *all_: all_[2][:-1]]
)
def test_an_outline_accounts_for_every_byte(change):
    assert Bundle.outline(smuggled(lambda header, inner, rest: rest)).trees == {"shared": {"layers.0.attention.q.A": 8}}
    with pytest.raises(ValueError, match="the reply: damaged"):
        Bundle.outline(smuggled(change), "the reply")
