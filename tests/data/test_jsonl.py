import gzip
import json
from collections import Counter

import pytest

from fedgraft.data.datasets import jsonl
from fedgraft.data.example import SPLITS, Example
from fedgraft.data.scoring import same_answer


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def everything(path):
    return [example for split in SPLITS for example in jsonl.load(split, str(path))]


USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": " Q ", "output": "A\n"}, ("Q", "", "A", ())),
        ({"instruction": "Q", "input": "C", "output": "A"}, ("Q", "C", "A", ())),
        ({"instruction": "Q", "input": None, "context": "C", "response": "A"}, ("Q", "C", "A", ())),
        ({"prompt": "Q", "response": "A"}, ("Q", "", "A", ())),
        ({"prompt": "Q", "completion": "A", "context": "C"}, ("Q", "C", "A", ())),
        ({"messages": [USER, ASSISTANT]}, ("Q", "", "A", ())),
        (
            {
                "messages": [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a"},
                    USER,
                    ASSISTANT,
                ]
            },
            ("Q", "", "A", (("system", "S"), ("user", "q"), ("assistant", "a"))),
        ),
    ],
)
def test_layouts(tmp_path, row, expected):
    (example,) = everything(write(tmp_path / "mine.jsonl", row))
    assert example == Example("mine-1", "mine", *expected)


def test_optional_fields_and_blank_lines(tmp_path):
    path = write(tmp_path / "mine.jsonl", "", {"id": 5, "category": "law", "split": "dev", "prompt": "Q", "response": "A"})
    assert jsonl.load("validation", str(path)) == [Example("5", "law", "Q", "", "A")]
    assert jsonl.load("train", str(path)) == []


def test_byte_order_mark_and_gzip(tmp_path):
    (tmp_path / "mine.jsonl.gz").write_bytes(gzip.compress('﻿{"prompt": "Grüße", "response": "A"}\n'.encode()))
    (example,) = everything(tmp_path / "mine.jsonl.gz")
    assert (example.instruction, example.category) == ("Grüße", "mine")


def test_rows_without_split_are_divided_by_their_prompt(tmp_path):
    rows = [{"id": str(n), "prompt": f"Q{n}", "response": f"A{n}"} for n in range(1000)]
    splits = {e.id: s for s in SPLITS for e in jsonl.load(s, str(write(tmp_path / "a.jsonl", *rows)))}
    shares = Counter(splits.values())
    assert 760 < shares["train"] < 840  # binomial(1000, 0.8): deviation 12.6
    assert 60 < shares["test"] < 140
    shorter = write(tmp_path / "b.jsonl", *reversed(rows[::2]))
    assert all(splits[e.id] == s for s in SPLITS for e in jsonl.load(s, str(shorter)))


def test_folder_with_files_named_after_splits(tmp_path):
    for split in SPLITS:
        write(tmp_path / "site" / f"{split}.jsonl", {"prompt": split, "response": "A"})
    write(tmp_path / ".hidden.jsonl", "no JSON")
    for split in SPLITS:
        (example,) = jsonl.load(split, str(tmp_path))
        assert (example.instruction, example.category) == (split, "site")


CASES = [
    ("not JSON {", r"mine.jsonl, line 2: broken JSON \(.* at column 1\)"),
    ('[{"prompt": "Q"', r"line 2: broken JSON .*this looks like one JSON array"),
    ([1], r"line 2: expected a JSON object, got list; write one JSON object per line"),
    (
        {"question": "Q", "answer": "A"},
        r"line 2: no layout fits the fields found \(answer, question\); accepted: instruction, .*; or prompt, .*; or messages",
    ),
    ({"instruction": "Q"}, r"line 2: no field 'output' or 'response' \(found: instruction\); accepted: instruction"),
    ({"prompt": "Q", "output": "A"}, r"line 2: no field 'response' or 'completion' \(found: output, prompt\)"),
    ({"prompt": "Q", "response": " "}, r"line 2: field 'response' is empty; fill it or remove the row"),
    ({"prompt": "Q", "response": None}, r"line 2: field 'response' is empty"),
    ({"prompt": 3, "response": "A"}, r"line 2: field 'prompt' must be text, got int"),
    ({"prompt": "\ud800", "response": "A"}, r"line 2: field 'prompt' holds half of a surrogate pair"),
    ({"prompt": "Q", "response": "A", "split": "holdout"}, r"line 2: unknown split 'holdout'; use train, validation or test"),
    ({"messages": "Q"}, r"line 2: field 'messages' must be a list of objects with role and content"),
    ({"messages": []}, r"line 2: the last message must be the assistant's, which is what is trained; got no message"),
    ({"messages": [ASSISTANT, USER]}, r"line 2: the last message must be the assistant's, which is what is trained; got user"),
    ({"messages": [ASSISTANT]}, r"line 2: the message before the assistant's last one must be the user's, got none"),
    ({"messages": [USER, ASSISTANT, ASSISTANT]}, r"line 2: the message before .* must be the user's, got assistant"),
    (
        {"messages": [{"role": "human", "content": "Q"}, ASSISTANT]},
        r"line 2: message 1 has role 'human'; the roles are system, user, assistant",
    ),
    ({"messages": [{"role": "user", "content": ["Q"]}, ASSISTANT]}, r"line 2, message 1: field 'content' must be text, got list"),
]


@pytest.mark.parametrize(("row", "message"), CASES, ids=[str(number) for number in range(len(CASES))])
def test_row_errors_name_file_and_line(tmp_path, row, message):
    path = write(tmp_path / "mine.jsonl", {"prompt": "Q", "response": "A"}, row)
    with pytest.raises(ValueError, match=message) as caught:
        jsonl.load("train", str(path))
    assert str(path) in str(caught.value)


def test_rows_say_how_their_answers_are_judged(tmp_path):
    """And where they say nothing, a row reads (and is digested) as one that cannot say it."""
    rows = [
        {"prompt": "2 + 2?", "response": "4 ", "choices": ["3", " 4", "5"]},
        {"prompt": "Capital of France?", "response": "Paris", "metric": "exact_match"},
        {"prompt": "Hello?", "response": "Hi", "metric": "rougeL"},
    ]
    chosen, exact, free = jsonl.load("train", str(write(tmp_path / "train.jsonl", *rows)))
    assert (chosen.choices, chosen.exact) == (("3", "4", "5"), False)
    assert (exact.choices, exact.exact) == ((), True)
    assert (free.choices, free.exact, free.scoring) == ((), False, "")
    assert len({chosen.scoring, exact.scoring, free.scoring}) == 3
    assert "choices" not in repr(free)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"choices": ["A"]}, "line 1: field 'choices' must be a list of at least two answers"),
        ({"choices": "A or B"}, "line 1: field 'choices' must be a list of at least two answers"),
        ({"choices": ["B", "C"]}, "line 1: field 'choices' must hold the response 'A' once; it holds 'B', 'C'"),
        ({"choices": ["A", "A"]}, "line 1: field 'choices' must hold the response 'A' once"),
        ({"choices": ["A", 2]}, "line 1: field 'choices' must be text, got int"),
        ({"metric": "bleu"}, "line 1: unknown metric 'bleu'; there are rougeL, exact_match"),
    ],
)
def test_errors_of_how_answers_are_judged(tmp_path, field, message):
    with pytest.raises(ValueError, match=message):
        jsonl.load("train", str(write(tmp_path / "train.jsonl", {"prompt": "Q", "response": "A", **field})))


@pytest.mark.parametrize(
    ("answer", "response", "same"),
    [
        ("Paris.", "paris", True),
        ("  New\n York ", "new york", True),
        ('"42"', "42", True),
        ("Paris, France", "Paris", False),
        ("", "Paris", False),
        ("-3", "3", False),
    ],
)
def test_answers_are_the_same_but_for_case_space_and_punctuation_around_them(answer, response, same):
    assert same_answer(answer, response) is same


def test_wrong_encoding_names_the_line(tmp_path):
    (tmp_path / "mine.jsonl").write_bytes(b'{"prompt": "Q", "response": "A"}\n{"prompt": "Gr\xfc\xdfe", "response": "A"}\n')
    with pytest.raises(ValueError, match=r"mine.jsonl, line 2: not UTF-8 \(byte 15 is 0xfc\); save the file as UTF-8"):
        jsonl.load("train", str(tmp_path / "mine.jsonl"))


def test_file_errors(tmp_path):
    with pytest.raises(ValueError, match=r"needs data.path"):
        jsonl.load("train")
    with pytest.raises(ValueError, match=r"gone.jsonl: there is no such file; check data.path"):
        jsonl.load("train", str(tmp_path / "gone.jsonl"))
    with pytest.raises(ValueError, match=r"the folder holds no .jsonl or .jsonl.gz file"):
        jsonl.load("train", str(tmp_path))
    with pytest.raises(ValueError, match=r"empty.jsonl: the file holds no rows"):
        jsonl.load("train", str(write(tmp_path / "empty.jsonl", "", " ")))
    with pytest.raises(ValueError, match=r"rows.json: the name must end in .jsonl or .jsonl.gz"):
        jsonl.load("train", str(write(tmp_path / "rows.json", "{}")))
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"broken.jsonl.gz: broken gzip file"):
        jsonl.load("train", str(tmp_path / "broken.jsonl.gz"))
    (tmp_path / "short.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "Q", "response": "A"}\n' * 100)[:-12])
    with pytest.raises(ValueError, match=r"short.jsonl.gz: broken gzip file"):
        jsonl.load("train", str(tmp_path / "short.jsonl.gz"))
