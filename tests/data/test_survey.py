"""The survey of a user's rows: lengths by hand, and every fault found where it was put and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedgraft.data.batches import encode
from fedgraft.data.example import Example
from fedgraft.data.partition import ClientData
from fedgraft.data.settings import DataSettings
from fedgraft.data.survey import row_lengths, survey

TEMPLATE_TOKENS = 19  # <|im_start|> user\n ... <|im_end|> \n <|im_start|> assistant\n, a token per byte and per marker


def example(number: int, instruction: str = "", response: str = "") -> Example:
    answer = response or f"The answer to this is a sentence of some length, number {number}."
    return Example(id=f"row-{number}", category="all", instruction=instruction or f"Question {number}?", context="", response=answer)


def client(name: str, first: int = 0) -> ClientData:
    """20 training, 5 validation and 6 test rows without a fault."""
    rows = [example(number) for number in range(first, first + 31)]
    return ClientData(name, rows[:20], rows[20:25], rows[25:])


def changed(data: ClientData, **splits: list[Example]) -> ClientData:
    return replace(data, **splits)


@pytest.fixture
def look(tiny_tokenizer):
    def do(*clients: ClientData, max_length: int = 512):
        return survey(clients, row_lengths(clients, tiny_tokenizer, "chat"), DataSettings(max_length=max_length))

    return do


def test_lengths_are_those_of_the_template_the_text_and_the_end_token(tiny_tokenizer):
    rows = [example(1, "abc", "de"), example(2, "a" * 50, "b" * 70)]
    found = row_lengths([ClientData("one", rows, [], [])], tiny_tokenizer, "chat")
    assert found == {"one": [(TEMPLATE_TOKENS + 3, 2 + 1), (TEMPLATE_TOKENS + 50, 70 + 1)]}


def test_spread_and_rows(look):
    rows = [example(number, "q" * number, "r" * (2 * number)) for number in range(1, 21)]
    figures = look(ClientData("one", rows[:12], rows[12:14], rows[14:])).clients["one"]
    assert figures.rows == {"train": 12, "validation": 2, "test": 6}
    assert (figures.prompt.median, figures.prompt.p95, figures.prompt.longest) == (
        TEMPLATE_TOKENS + 11,
        TEMPLATE_TOKENS + 20,
        TEMPLATE_TOKENS + 20,
    )
    assert (figures.response.median, figures.response.longest) == (2 * 11 + 1, 2 * 20 + 1)
    assert figures.longest == TEMPLATE_TOKENS + 20 + 2 * 20 + 1


@pytest.mark.parametrize("max_length", [70, 88, 90, 101, 102, 103, 104])
def test_cut_rows_are_those_that_encode_cuts(look, tiny_tokenizer, max_length):
    rows = [example(number, f"Question {number}?", "r" * (50 + number)) for number in range(31)]
    data = ClientData("one", rows[:20], rows[20:25], rows[25:])
    cut = sum(encode(row, tiny_tokenizer, "chat", max_length)[1] for row in rows)
    found = look(data, max_length=max_length)
    assert found.clients["one"].cut == cut
    assert any(f"{cut} of 31 rows exceed data.max_length {max_length}" in problem.problem for problem in found.problems) == (cut > 0)


def test_labels_are_few_short_and_often_used(look):
    labelled = [replace(row, response=("yes", "no")[number % 2]) for number, row in enumerate(client("a").train)]
    data = changed(client("a"), train=labelled, validation=labelled[:2], test=labelled[2:8])
    assert look(data).clients["a"].labels == {"no": 14, "yes": 14}
    assert look(client("a")).clients["a"].labels == {}


def test_clean_clients_have_no_problem(look):
    assert look(client("a"), client("b", first=100)).problems == []


def yes_no(data: ClientData, train: list[str], test: list[str]) -> ClientData:
    rows = {
        split: [replace(row, response=words[number % len(words)]) for number, row in enumerate(getattr(data, split))]
        for split, words in (("train", train), ("validation", train), ("test", test))
    }
    return changed(data, **rows)


A, B = client("a"), client("b", first=100)
FAULTS = [
    ((changed(A, train=A.train[:15]), B), "a", "only 15 training rows"),
    ((changed(A, test=A.test[:1]), B), "a", "only 1 test row,"),
    ((changed(A, train=[*A.train, replace(A.train[3], id="again")]), B), "a", "training rows that repeat an earlier one: again"),
    (
        (changed(A, train=[*A.train, replace(A.train[3], id="again", response=A.train[3].response.upper())]), B),
        "a",
        "repeat an earlier one: again",
    ),
    (
        (
            changed(A, test=[*A.test, replace(A.train[3], id="seen", instruction=" question  3?", response="Another one, which is long.")]),
            B,
        ),
        "a",
        "seen",
    ),
    (
        (changed(A, validation=[*A.validation, replace(A.train[3], id="seen")]), B),
        "a",
        "validation rows with the prompt of a training row: seen",
    ),
    ((changed(A, train=[*A.train, example(99, response="...")]), B), "a", "responses without a letter or digit: row-99"),
    ((changed(A, train=[*A.train, example(99, response="Yes")]), B), "a", "responses of a single word where most are sentences: row-99"),
    ((A, changed(B, test=[*B.test, A.test[0]])), "", "1 row held by more than one client: a, b"),
    ((A,), "", "there is one client"),
    (
        (yes_no(A, ["yes", "no"], ["maybe"]), yes_no(B, ["yes", "no"], ["no"])),
        "a",
        "labels in validation or test that no training row has: maybe",
    ),
    ((yes_no(A, ["yes"] * 19 + ["no"], ["yes"]), yes_no(B, ["yes", "no"], ["no"])), "a", "19 of 20 training rows have the label 'yes'"),
]


@pytest.mark.parametrize(("clients", "place", "told"), FAULTS)
def test_fault_is_found_where_it_is_and_has_a_remedy(look, clients, place, told):
    (problem,) = look(*clients).problems
    assert problem.client == place
    assert told in problem.problem
    assert problem.remedy


def test_long_lists_are_cut_short(look):
    data = changed(A, train=[*A.train, *(replace(row, id=f"copy-{row.id}") for row in A.train[:5])])
    (problem,) = look(data, B).problems
    assert problem.problem.endswith("copy-row-0, copy-row-1, copy-row-2 and 2 more")
