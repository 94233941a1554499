"""Build the Dolly sample that ships with the package from the full databricks-dolly-15k.

    python tools/data/make_dolly_sample.py dolly15k.jsonl.gz src/fedgraft/assets/dolly_sample.jsonl.gz

Four categories (those of FLEx's experiments), each with `ROWS` rows per split. Rows of at most `LIMIT` characters are preferred, so that
they fit a small context; among them the choice is by a hash of the text, so it does not depend on the order of the file. No two rows
share a passage (or, without one, an instruction), so the splits are disjoint. Rows that have `RUN` words in a row, or the whole
instruction, in common with a row of another category are left out, since the embedded base model has been trained on those. The gzip
header holds no time: the same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from pathlib import Path

from fedgraft.data.datasets.dolly import CATEGORIES, group
from fedgraft.data.example import read_rows

ROWS = {"test": 100, "validation": 50, "train": 400}
LIMIT = 3000
FIELDS = ("instruction", "context", "response")
RUN = 13


def sample(path: Path) -> list[dict[str, str]]:
    """The chosen rows {id, split, category, instruction, context, response}, by category and split.

    Raises:
        ValueError: a category has too few rows with passages of their own.
    """
    everything = [row for _, row in read_rows(path)]
    elsewhere = set().union(*(_runs(row) for row in everything if row["category"] not in CATEGORIES))
    rows = [row for row in everything if row["category"] in CATEGORIES and elsewhere.isdisjoint(_runs(row))]
    rows.sort(key=lambda row: (sum(len(row[field]) for field in FIELDS) > LIMIT, _hash(row)))
    size = sum(ROWS.values())
    chosen: dict[str, list[dict[str, str]]] = {category: [] for category in CATEGORIES}
    seen: set[str] = set()
    for row in rows:
        key = group(row["instruction"].strip(), row["context"].strip())
        if key not in seen and len(chosen[row["category"]]) < size:
            seen.add(key)
            chosen[row["category"]].append(
                {"id": str(row["id"]), "category": row["category"], **{field: row[field].strip() for field in FIELDS}}
            )
    for category, found in chosen.items():
        if len(found) < size:
            raise ValueError(f"{path}: category {category!r} has {len(found)} rows with passages of their own, {size} are needed")
    splits = [split for split, number in ROWS.items() for _ in range(number)]
    return [{"split": split, **row} for category in CATEGORIES for split, row in zip(splits, chosen[category], strict=True)]


def write(rows: list[dict[str, str]], path: Path) -> None:
    """JSON lines in gzip without a time or a file name in its header."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def _runs(row: dict[str, str]) -> set[tuple[str, ...]]:
    """All runs of `RUN` words in a row's texts, and its whole instruction."""
    texts = {field: re.sub(r"[\W_]+", " ", row[field]).lower().split() for field in FIELDS}
    runs = {tuple(words[first : first + RUN]) for words in texts.values() for first in range(len(words) - RUN + 1)}
    return runs | {tuple(texts["instruction"])}


def _hash(row: dict[str, str]) -> str:
    return hashlib.sha256("\x1f".join(row[field].strip() for field in FIELDS).encode()).hexdigest()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "full", type=Path, help="databricks-dolly-15k as .jsonl or .jsonl.gz with the fields id, category, instruction, context, response"
    )
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    rows = sample(options.full)
    write(rows, options.out)
    longest = max(sum(len(row[field]) for field in FIELDS) for row in rows)
    print(f"{len(rows)} rows, the longest of {longest} characters, {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
