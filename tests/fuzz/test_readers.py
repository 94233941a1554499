"""Whatever a reader is given, it reads it or says what is wrong: no other error, and no memory for sizes that are only claimed."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc

import pytest
from hypothesis import strategies as st

from fedgraft import files
from fedgraft.bundle import HEADER_BYTES, Bundle
from fedgraft.data import example
from fedgraft.engine import wire
from fedgraft.engine.wire import Frame
from fedgraft.recipe import load_recipe
from fedgraft.yaml_text import MOST_CHARACTERS, read_value, read_yaml
from tests.fuzz.readers import READERS, SHARED, damaged, folder
from tests.strategies import given


@pytest.fixture(scope="module", autouse=True)
def tidy():
    """What was written is removed."""
    yield
    import shutil

    shutil.rmtree(folder())
    folder.cache_clear()


@pytest.mark.parametrize("name", READERS)
def test_sound_inputs_are_read(name):
    reader = READERS[name]
    if name != "base's index":  # whose shards are not there
        for seed in reader.seeds:
            reader.read(seed)


@pytest.mark.parametrize("name", READERS)
@given(number=st.integers(0, 2**63), max_examples=60)
def test_damaged_inputs_are_read_or_refused(name, number):
    reader = READERS[name]
    try:
        reader.read(damaged(random.Random(number), reader.seeds))
    except (ValueError, OSError) as error:
        assert str(error)  # noqa: PT017


@pytest.mark.parametrize("name", READERS)
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode(errors="surrogatepass")), max_examples=40)
def test_any_bytes_are_read_or_refused(name, content):
    try:
        READERS[name].read(content)
    except (ValueError, OSError) as error:
        assert str(error)  # noqa: PT017


def peak(read, content):
    """Most bytes that Python allocates while this is refused; the refusal."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r".") as refusal:
            read(content)
        return tracemalloc.get_traced_memory()[1], str(refusal.value)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("claimed", [HEADER_BYTES + 1, 2**40, 2**63])
def test_a_claimed_header_takes_no_memory(claimed):
    content = claimed.to_bytes(8, "little") + SHARED.encode()[8:]
    for read in (Bundle.decode, Bundle.outline):
        most, said = peak(read, content)
        assert most < 100_000
        assert f"a header of {claimed} bytes, at most {HEADER_BYTES} are read" in said


def test_a_claimed_shape_takes_no_memory():
    head = {"__metadata__": {"fedgraft": json.dumps({"schema": 1, "facts": {}, "trees": ["t"]})}}
    head |= {"t/a": {"dtype": "F32", "shape": [2**40, 2**10], "data_offsets": [0, 2**52]}}
    text = json.dumps(head).encode()
    most, said = peak(Bundle.decode, len(text).to_bytes(8, "little") + text)
    assert most < 100_000
    assert "damaged" in said


def test_a_long_head_is_not_parsed(monkeypatch):
    monkeypatch.setattr(wire, "HEAD_BYTES", 100)
    most, said = peak(Frame.decode, Frame(kind="ask", facts={"run": "x" * 1000}).encode())
    assert most < 100_000
    assert "at most 100 are read" in said


def test_aliases_that_multiply_are_counted_before_anything_is_built():
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
    most, said = peak(lambda text: read_yaml(text, "r.yaml"), laughs)
    assert most < 5_000_000
    assert said.startswith("r.yaml: not valid YAML (with its aliases ")
    assert "at most 100,000 are read" in said
    assert read_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n", "r.yaml") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [*a]", "an alias stands inside what it names"),
        ("a: " + "{b: " * 5000, "recursion"),
        ("a: !!python/object/apply:os.system [touch ran]", "could not determine a constructor"),
        ("a: !!int x", "invalid literal"),
        ("a: !!bool x", "'x'"),
        ("? [a]\n: b", "a key is one word"),
        ("a: " + "x" * MOST_CHARACTERS, "at most 1,048,576 are read"),
    ],
)
def test_what_yaml_can_do_is_refused_by_name(tmp_path, monkeypatch, text, said):
    """Nothing of it is carried out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match="not valid YAML") as error:
        load_recipe(tmp_path / "r.yaml")
    assert said in str(error.value)
    with pytest.raises(ValueError, match="not valid YAML"):
        read_value(text, "--set x")
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_names_of_plug_ins_are_names_of_files_that_are_there():
    for name in ("../recipe", "os.path", "method", "_personal", "fedgraft.cli", "flex.py", ""):
        with pytest.raises(ValueError, match="unknown method"):
            load_recipe({"method": {"name": name}})


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    """Packed to a thousandth, as a file made to fill memory would be."""
    monkeypatch.setattr(example, "LINE_BYTES", 1 << 16)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "Q", "response": "A"}\n' + b"x" * 50_000_000))
    most, said = peak(lambda _: list(example.read_rows(path)), b"")
    assert most < 2_000_000
    assert f"{path}, line 2: longer than 65,536 bytes" in said


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b'"\\ud800"', b"\xed\xa0\x80", b"1" * 5000, b"\xff"])
def test_json_is_refused_as_json(content):
    with pytest.raises(ValueError, match=r"."):
        files.parse_json(content)


def test_json_that_can_be_written_again_is_read():
    assert files.parse_json(b'{"a": "\\ud83d\\ude00", "b": [1.5, null]}') == {"a": "😀", "b": [1.5, None]}
