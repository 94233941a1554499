"""databricks-dolly-15k (CC BY-SA 3.0, (c) Databricks): a shipped sample of four categories, or the full set from a file.

Rows with the same passage (or, without one, the same instruction) lie in the same split, in the sample and in the full set alike, and
what the sample holds has the same split in both. So nothing tuned on one is tested on a row it has seen in the other.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from fedgraft.data.example import SPLITS, Example, check_split, fields_of, hashed_split, read_rows, text_of

METRIC = "rougeL"
SAMPLE = Path(__file__).parents[2] / "assets" / "dolly_sample.jsonl.gz"
CATEGORIES = ("classification", "closed_qa", "information_extraction", "summarization")
REQUIRED = ("category", "instruction", "context", "response")
OPENING = 200  # passages that begin alike are excerpts of one article


def load(split: str, path: str | None = None) -> list[Example]:
    """Rows of one split, in file order: of the shipped sample, or of the full set (`.jsonl` or `.jsonl.gz`) at `path`.

    The full set is divided 80/10/10 by a hash of the text; exact repetitions of a row are left out.

    Raises:
        ValueError: the split is unknown or the file is not Dolly; the message names file and line.
    """
    check_split(split)
    return splits(path)[split]


def splits(path: str | None = None) -> dict[str, list[Example]]:
    """`load` for every split, in one reading."""
    file = SAMPLE if path is None else Path(path)
    chosen: dict[str, dict[tuple[str, str, str, str], Example]] = {split: {} for split in SPLITS}
    for place, row in read_rows(file):
        example = _example(row, place)
        rows = chosen[row["split"] if path is None else _full_split(example)]
        rows.setdefault((example.category, example.instruction, example.context, example.response), example)
    return {split: list(rows.values()) for split, rows in chosen.items()}


def group(instruction: str, context: str) -> str:
    """What rows of one split share: letters and digits of the passage's opening, or of the instruction where there is no passage."""
    letters = re.sub(r"[\W_]+", " ", context or instruction).strip().lower()
    return letters[:OPENING] if context else letters


@cache
def _sample_splits() -> dict[str, str]:
    return {group(row["instruction"], row["context"]): row["split"] for _, row in read_rows(SAMPLE)}


def _full_split(example: Example) -> str:
    key = group(example.instruction, example.context)
    return _sample_splits().get(key) or hashed_split(key)


def _example(row: dict[str, Any], place: str) -> Example:
    missing = [name for name in REQUIRED if name not in row]
    if missing:
        raise ValueError(
            f"{place}: no field {missing[0]!r} (found: {fields_of(row)}); "
            f"Dolly rows have {', '.join(REQUIRED)}; for other files set data.dataset: jsonl"
        )
    return Example(
        id=str(row.get("id", place.rsplit(" ", 1)[1])),
        category=text_of(row, ["category"], place),
        instruction=text_of(row, ["instruction"], place),
        context=text_of(row, ["context"], place, required=False),
        response=text_of(row, ["response"], place),
    )
