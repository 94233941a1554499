import gzip
import importlib.util
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from fedgraft.data.datasets import dolly
from fedgraft.data.example import SPLITS, read_rows

ROOT = Path(__file__).parents[2]


def tool():
    spec = importlib.util.spec_from_file_location("make_dolly_sample", ROOT / "tools" / "data" / "make_dolly_sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(number, context="", category="open_qa", **other):
    return {"id": number, "category": category, "instruction": f"Question {number}?", "context": context, "response": f"r{number}", **other}


def test_sample_has_what_the_experiments_need():
    wanted = {"train": 400, "validation": 50, "test": 100}
    for split, number in wanted.items():
        rows = dolly.load(split)
        assert Counter(example.category for example in rows) == dict.fromkeys(dolly.CATEGORIES, number)
        assert all(example.instruction and example.response for example in rows)


def test_sample_s_splits_share_no_passage_and_no_instruction_with_context():
    keys = [dolly.group(example.instruction, example.context) for split in SPLITS for example in dolly.load(split)]
    assert len(set(keys)) == len(keys) == 2200
    texts = {(example.instruction, example.context) for split in SPLITS for example in dolly.load(split)}
    assert len(texts) == 2200


def test_sample_fits_a_small_context():
    assert max(len(r["instruction"]) + len(r["context"]) + len(r["response"]) for _, r in read_rows(dolly.SAMPLE)) <= 3000


def test_sample_s_gzip_header_holds_no_time():
    assert dolly.SAMPLE.read_bytes()[4:8] == bytes(4)


@pytest.mark.skipif("FEDGRAFT_DATA" not in os.environ, reason="needs the full set in the folder FEDGRAFT_DATA")
def test_sample_is_what_the_tool_builds():
    assert tool().sample(Path(os.environ["FEDGRAFT_DATA"]) / "dolly15k.jsonl.gz") == [r for _, r in read_rows(dolly.SAMPLE)]


def test_tool_keeps_one_row_per_passage_whatever_the_order(tmp_path, monkeypatch):
    module = tool()
    monkeypatch.setattr(module, "ROWS", {"test": 1, "validation": 1, "train": 2})
    rows = [row(f"{c}-{n}", context=f"passage {c} {n % 6}", category=c) for c in dolly.CATEGORIES for n in range(12)]
    rows += [row(f"long {c}", context="long " * 700 + c, category=c) for c in dolly.CATEGORIES]
    rows += [row("seen", context="", category="open_qa") | {"instruction": "Question closed_qa-0?"}]
    first = module.sample(Path(write(tmp_path / "a.jsonl", rows)))
    assert first == module.sample(Path(write(tmp_path / "b.jsonl", rows[::-1])))
    assert Counter((r["category"], r["split"]) for r in first) == {(c, s): n for c in dolly.CATEGORIES for s, n in module.ROWS.items()}
    assert len({r["context"] for r in first}) == len(first)
    assert all(len(r["context"]) < 3000 for r in first)
    assert "Question closed_qa-0?" not in {r["instruction"] for r in first}
    module.write(first, tmp_path / "a.gz")
    module.write(first, tmp_path / "b.gz")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    with pytest.raises(ValueError, match="category 'classification' has 3 rows"):
        module.sample(
            Path(write(tmp_path / "c.jsonl", [r for r in rows if not r["context"].endswith(("3", "4", "5", dolly.CATEGORIES[0]))]))
        )


def test_full_set_is_divided_by_text_and_keeps_the_sample_s_splits(tmp_path):
    sample = [
        (r["split"], {key: r[key] for key in ("id", "category", "instruction", "context", "response")}) for _, r in read_rows(dolly.SAMPLE)
    ]
    fresh = [row(number) for number in range(1000)]
    path = write(tmp_path / "full.jsonl", [r for _, r in sample] + fresh)
    found = {example.id + example.category: split for split in SPLITS for example in dolly.load(split, path)}
    assert all(found[r["id"] + r["category"]] == split for split, r in sample)
    shares = Counter(found[f"{number}open_qa"] for number in range(1000))
    assert 760 < shares["train"] < 840  # binomial(1000, 0.8): deviation 12.6
    again = write(tmp_path / "reversed.jsonl", [row(number) for number in reversed(range(1000))])
    assert {e.id for e in dolly.load("test", again)} == {str(n) for n in range(1000) if found[f"{n}open_qa"] == "test"}


def test_full_set_keeps_rows_of_one_passage_together_and_drops_repetitions(tmp_path):
    rows = [row(f"{passage}.{number}", context=f"Passage {passage}.") for passage in range(40) for number in range(3)]
    path = write(tmp_path / "full.jsonl", rows + [r | {"id": "again"} for r in rows])
    found = {e.id: split for split in SPLITS for e in dolly.load(split, path)}
    assert found.keys() == {r["id"] for r in rows}
    assert all(found[f"{p}.0"] == found[f"{p}.1"] == found[f"{p}.2"] for p in range(40))
    assert len(set(found.values())) == 3


def test_compressed_file_without_ids(tmp_path):
    plain = row(1)
    del plain["id"]
    with gzip.open(tmp_path / "full.jsonl.gz", "wt") as sink:
        sink.write(json.dumps(plain) + "\n")
    (example,) = [e for split in SPLITS for e in dolly.load(split, str(tmp_path / "full.jsonl.gz"))]
    assert (example.id, example.instruction) == ("1", "Question 1?")


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="unknown split 'dev'; there are: train, validation, test"):
        dolly.load("dev")
    path = write(tmp_path / "own.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(ValueError, match=r"own.jsonl, line 1: no field 'category' \(found: instruction, output\).*set data.dataset: jsonl"):
        dolly.load("train", path)


def test_general_text_is_the_licensed_sources():
    rows = [r for _, r in read_rows(dolly.SAMPLE.with_name("general_text.jsonl.gz"))]
    assert {r["source"] for r in rows} == {"wikinews", "medquad", "african_storybook_en", "fairytales", "folktales_classics"}
    assert all(r["title"] and r["url"].startswith("https://en.wikinews.org/") for r in rows if r["source"] == "wikinews")
    assert all(r["author"] for r in rows if r["source"] == "african_storybook_en")
    assert 150_000 <= sum(len(r["text"]) for r in rows) <= 250_000
