"""Build the multiple-choice task that ships with the package from the test rows of ARC-Easy.

    python tools/data/make_arc_sample.py arc.jsonl.gz src/fedgraft/assets/tasks/arc_easy_sample.jsonl.gz

`ROWS` rows with four options, of at most `LIMIT` characters in all, chosen by a hash of the question, so that the choice does not depend on
the order of the file. Wording and order of the options stay. The gzip header holds no time: the same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

from fedgraft.data.example import read_rows

ROWS = 100
LIMIT = 400


def sample(path: Path) -> list[dict[str, Any]]:
    """The chosen rows {id, question, choices, answer}.

    Raises:
        ValueError: there are too few.
    """
    rows = [row for _, row in read_rows(path) if row["dataset"] == "arc_easy" and row["split"] == "test" and len(row["choices"]) == 4]
    short = [row for row in rows if len(row["question"]) + sum(map(len, row["choices"])) <= LIMIT]
    if len(short) < ROWS:
        raise ValueError(f"{path}: {len(short)} rows are short enough, {ROWS} are needed")
    short.sort(key=lambda row: hashlib.sha256(row["question"].encode()).hexdigest())
    return [{name: row[name] for name in ("id", "question", "choices", "answer")} for row in short[:ROWS]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    words = parser.parse_args()
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sample(words.source))
    words.out.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
