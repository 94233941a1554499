"""Multiple-choice tasks: JSON-lines files, one shipped by name, others by path, asked as lm-eval's MMLU and ARC tasks ask them."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgraft import plugins
from fedgraft.data.example import SUFFIXES, fields_of, read_rows

SHIPPED = Path(__file__).parents[1] / "assets" / "tasks"
LETTERS = string.ascii_uppercase


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, the options that a model may go on with, and the index of the right one."""

    prompt: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions under a name, which its figures carry."""

    name: str
    lettered: bool
    """The options are the letters before the choices (as in MMLU), not the choices' text (as in ARC)."""
    questions: list[Question]


def shipped_tasks() -> list[str]:
    """The names of the shipped tasks."""
    return sorted(_stem(path) for path in SHIPPED.iterdir())


def load_tasks(sources: Sequence[str], split: str, rows: int | None = None) -> list[Task]:
    """The tasks of `evaluation.tasks`, at most `rows` questions of each.

    Raises:
        ValueError: no such task or file, a row that is none, no row of the split, or two tasks of one name.
    """
    tasks: dict[str, Task] = {}
    for source in sources:
        task = load_task(source, split, rows)
        if task.name in tasks:
            raise ValueError(
                f"evaluation.tasks: two tasks are called {task.name!r}, so their figures could not be told apart; rename a file"
            )
        tasks[task.name] = task
    return list(tasks.values())


def load_task(source: str, split: str, rows: int | None = None) -> Task:
    """A shipped task by name, or the rows of a file: {question, choices, answer: index}; optional: subject, split.

    Rows that name another split are left out. A row with a subject is asked as in MMLU, with lettered choices; one without as in ARC.

    Raises:
        ValueError: no such task or file, or a row that is none; names file and line.
    """
    path = _find(source)
    found = [(place, row) for place, row in read_rows(path) if row.get("split", split) == split]
    if not found:
        raise ValueError(
            f"{path}: no row of the split {split!r}, which evaluation.split asks for; rows without a field 'split' always count"
        )
    lettered = "subject" in found[0][1]
    for place, row in found:
        _check(row, place, lettered)
    ask = _as_mmlu if lettered else _as_arc
    return Task(name=_stem(path), lettered=lettered, questions=[ask(row) for _, row in found[:rows]])


def _as_mmlu(row: dict[str, Any]) -> Question:
    subject, letters = " ".join(row["subject"].split("_")), LETTERS[: len(row["choices"])]
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True))
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return Question(f"{head}{row['question'].strip()}\n{choices}\nAnswer:", tuple(letters), row["answer"])


def _as_arc(row: dict[str, Any]) -> Question:
    return Question(f"Question: {row['question']}\nAnswer:", tuple(row["choices"]), row["answer"])


def _check(row: dict[str, Any], place: str, lettered: bool) -> None:
    question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{place}: field 'question' must be text (found: {fields_of(row)})")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(f"{place}: field 'choices' must be a list of texts, none of them empty")
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{place}: {len(choices)} choices; there must be 2 to {len(LETTERS)}")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"{place}: field 'answer' must be the index of the right choice, 0 to {len(choices) - 1}, got {answer!r}")
    if ("subject" in row) != lettered or (lettered and not isinstance(row["subject"], str)):
        raise ValueError(f"{place}: either every row has a 'subject', a text (asked as in MMLU), or none has (asked as in ARC)")


def _find(source: str) -> Path:
    path, known = Path(source).expanduser(), shipped_tasks()
    if source in known:
        return SHIPPED / f"{source}.jsonl.gz"
    if not path.is_file():
        hint = plugins.nearest(source, known)
        raise ValueError(f"evaluation.tasks: {source}: no such file{hint}; shipped tasks: {', '.join(known)}; others are .jsonl files")
    return path


def _stem(path: Path) -> str:
    return next((path.name.removesuffix(suffix) for suffix in SUFFIXES[::-1] if path.name.endswith(suffix)), path.stem)
