"""From what a user says, in a chat or in a file, to the tokens after which an answer begins: the words around it are those of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedgraft import files
from fedgraft.data.example import SUFFIXES, Example, fields_of, read_rows, text_of

ROLES = ("system", "user", "assistant")


def read_prompts(path: Path) -> list[Example]:
    """The prompts of a file, each with its place as id: lines of text, or of JSON (`.jsonl`, `.jsonl.gz`) as training rows are written.

    A row has `messages`, `instruction` (and `input` or `context`) or `prompt` (and `context`). A response in it is left aside: that of a
    field, or the assistant's last message.

    Raises:
        ValueError: no such file, no prompt in it, or a row that is none; names file and line.
    """
    if path.name.endswith(SUFFIXES):
        return [_row(row, place) for place, row in read_rows(path)]
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; give a text file with one prompt per line, or a .jsonl file")
    lines = [(number, line.strip()) for number, line in enumerate(files.read_text(path).splitlines(), start=1)]
    found = [example_of(line, f"{path}, line {number}") for number, line in lines if line]
    if not found:
        raise ValueError(f"{path}: the file holds no prompts; write one per line")
    return found


def _row(row: Mapping[str, Any], place: str) -> Example:
    if isinstance(row.get("messages"), list):
        messages = row["messages"]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"{place}: field 'messages' must be a list of objects with role and content")
        ends = bool(messages) and messages[-1].get("role") == "assistant"
        return example_of(messages[:-1] if ends else messages, place)
    field = next((name for name in ("instruction", "prompt") if name in row), None)
    if field is None:
        raise ValueError(f"{place}: no prompt in it; give it the field prompt, instruction or messages (it has {fields_of(row)})")
    whole = example_of(text_of(row, [field], place), place)
    return replace(whole, context=text_of(row, ["input", "context"], place, required=False))


def example_of(messages: str | Sequence[Mapping[str, str]], row: str = "prompt") -> Example:
    """A row without response: the last user's message is its instruction, the others are its turns.

    Raises:
        ValueError: no message, one without text, an unknown role, or another's than the user's at the end; names `row`.
    """
    turns = [("user", messages)] if isinstance(messages, str) else [_turn(message, row) for message in messages]
    if not turns or turns[-1][0] != "user":
        raise ValueError(f"{row}: the last message must be the user's (role: user)")
    if not turns[-1][1].strip():
        raise ValueError(f"{row}: the user's last message is empty")
    return Example(row, "", turns[-1][1].strip(), "", "", tuple(turns[:-1]))


def _turn(message: Mapping[str, str], row: str) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{row}: a message has role {role!r}; choose from {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"{row}: the {role}'s message has no text as content")
    return role, content
