"""Anybody's own instruction data: JSON-lines files in the usual layouts.

A row is one of `LAYOUTS`; optional fields are `id`, `category` (default: the file's name), `split`, and for evaluation `choices` (a list of
answers, the response among them: which is likeliest?) and `metric: exact_match` (an answer has to be the response). The split of a row is
its own field, else the file's name where that is a split (`train.jsonl`), else a hash of the prompt: 80 % train, 10 % validation, 10 %
test, whatever the row order. In a chat only the last message, the assistant's, is trained on; the earlier ones are its prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedgraft.data.example import SPLITS, Example, check_split, fields_of, hashed_split, read_rows, row_files, text_of
from fedgraft.data.scoring import choices_of, is_exact

METRIC = "rougeL"
LAYOUTS = (
    "instruction, optional input or context, output or response",
    "prompt, optional context, response or completion",
    "messages: [{role, content}, ...] that ends with an assistant message",
)
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
ROLES = ("system", "user", "assistant")
Parts = tuple[str, str, str, tuple[tuple[str, str], ...]]  # instruction, context, response, turns


def load(split: str, path: str | None = None) -> list[Example]:
    """Rows of one split of a file, or of all files in a folder and its subfolders by name; in file order.

    Raises:
        ValueError: there is nothing to read, or a row is not understood; the message names file and line.
    """
    check_split(split)
    return splits(path)[split]


def splits(path: str | None = None) -> dict[str, list[Example]]:
    """`load` for every split, in one reading."""
    if path is None:
        raise ValueError("dataset 'jsonl' needs data.path: a .jsonl or .jsonl.gz file, or a folder of them")
    found: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for file in row_files(Path(path)):
        for split, example in _read(file):
            found[split].append(example)
    return found


def stem(file: Path) -> str:
    """File name without `.jsonl` or `.jsonl.gz`."""
    return file.name.removesuffix(".gz").removesuffix(".jsonl")


def _read(file: Path) -> list[tuple[str, Example]]:
    named = SPLIT_NAMES.get(stem(file).lower())
    category = file.resolve().parent.name if named else stem(file)
    return [_example(row, place, named, category) for place, row in read_rows(file)]


def _example(row: dict[str, Any], place: str, named: str | None, category: str) -> tuple[str, Example]:
    parts = next((build for field, build in BUILDERS.items() if field in row), _unknown)(row, place)
    instruction, context, response, turns = parts
    example = Example(
        id=_id(row, place) or f"{category}-{place.rsplit(' ', 1)[1]}",
        category=text_of(row, ["category"], place, required=False) or category,
        instruction=instruction,
        context=context,
        response=response,
        turns=turns,
        choices=choices_of(row, response, place),
        exact=is_exact(row, place, METRIC),
    )
    prompt = "\x1f".join([*(content for _, content in turns), instruction, context])
    return _split_of(row, place) or named or hashed_split(prompt), example


def _id(row: dict[str, Any], place: str) -> str:
    given = row.get("id")
    return str(given) if isinstance(given, int | float) else text_of(row, ["id"], place, required=False)


def _split_of(row: dict[str, Any], place: str) -> str | None:
    given = text_of(row, ["split"], place, required=False)
    if given and given.lower() not in SPLIT_NAMES:
        raise ValueError(f"{place}: unknown split {given!r}; use train, validation or test, or leave the field out")
    return SPLIT_NAMES[given.lower()] if given else None


def _alpaca(row: dict[str, Any], place: str) -> Parts:
    response = text_of(row, _one_of(row, ("output", "response"), place), place)
    return text_of(row, ["instruction"], place), text_of(row, ["input", "context"], place, required=False), response, ()


def _prompt(row: dict[str, Any], place: str) -> Parts:
    response = text_of(row, _one_of(row, ("response", "completion"), place), place)
    return text_of(row, ["prompt"], place), text_of(row, ["context"], place, required=False), response, ()


def _messages(row: dict[str, Any], place: str) -> Parts:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages
    ):
        raise ValueError(f"{place}: field 'messages' must be a list of objects with role and content")
    turns = []
    for number, message in enumerate(messages, start=1):
        if message["role"] not in ROLES:
            raise ValueError(f"{place}: message {number} has role {message['role']!r}; the roles are {', '.join(ROLES)}")
        turns.append((str(message["role"]), text_of(message, ["content"], f"{place}, message {number}")))
    roles = [role for role, _ in turns]
    if not roles or roles[-1] != "assistant":
        raise ValueError(
            f"{place}: the last message must be the assistant's, which is what is trained; got {roles[-1] if roles else 'no message'}"
        )
    if roles[-2:-1] != ["user"]:
        raise ValueError(
            f"{place}: the message before the assistant's last one must be the user's, got {roles[-2] if len(roles) > 1 else 'none'}"
        )
    return turns[-2][1], "", turns[-1][1], tuple(turns[:-2])


def _unknown(row: dict[str, Any], place: str) -> Parts:
    raise ValueError(f"{place}: no layout fits the fields found ({fields_of(row)}); accepted: " + "; or ".join(LAYOUTS))


def _one_of(row: dict[str, Any], names: tuple[str, ...], place: str) -> tuple[str, ...]:
    if not any(name in row for name in names):
        raise ValueError(f"{place}: no field {' or '.join(map(repr, names))} (found: {fields_of(row)}); accepted: " + "; or ".join(LAYOUTS))
    return names


BUILDERS: dict[str, Callable[[dict[str, Any], str], Parts]] = {"messages": _messages, "instruction": _alpaca, "prompt": _prompt}
