"""Build the general text that ships with the package from documents the embedded base model was not trained on.

    python tools/data/make_general_text.py --held-out held_out.jsonl --corpus CORPUS src/fedgraft/assets/general_text.jsonl.gz

`held_out.jsonl` is written by `tools/pretrain/prepare.py`; CORPUS is the folder that was prepared (its `corpus/<source>.jsonl.xz` hold
titles, authors and addresses). Rows are {source, title?, author?, url?, text}. Documents are cut after the paragraph that passes
`DOCUMENT` characters, sources after `BUDGET`; paragraphs of `SHARED` or more characters that also occur in a training document are left
out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

BUDGET = {"wikinews": 80_000, "medquad": 60_000, "african_storybook_en": 10_000, "fairytales": 15_000, "folktales_classics": 50_000}
HEADS = {"wikinews": "title", "medquad": "question"}
CREDITS = ("title", "author", "url")
DOCUMENT = 6_000
SHARED = 80


def corpus_rows(folder: Path, source: str) -> dict[str, dict[str, Any]]:
    """Document text as `prepare.py` writes it -> the corpus row it came from."""
    rows = [json.loads(line) for line in lzma.open(folder / "corpus" / f"{source}.jsonl.xz", "rt", encoding="utf-8")]
    head = HEADS.get(source)
    return {f"{row[head]}\n\n{row['text']}" if head else row["text"]: row for row in rows}


def unseen(text: str, training: set[str]) -> list[str]:
    """The document's paragraphs that no training document holds, up to the length of a document."""
    kept: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.strip() not in training and sum(map(len, kept)) < DOCUMENT:
            kept.append(paragraph)
    return kept


def general_text(held_out: list[dict[str, str]], folder: Path) -> list[dict[str, str]]:
    """The rows to ship, by source, in the order of the held-out file."""
    held = {row["text"] for row in held_out}
    sources = [
        file.name.removesuffix(".jsonl.xz") for file in sorted((folder / "corpus").glob("*.jsonl.xz")) if not file.name.startswith("novels")
    ]
    corpus = {source: corpus_rows(folder, source) for source in sources}
    paragraphs = (part.strip() for rows in corpus.values() for text in rows if text not in held for part in text.split("\n\n"))
    training = {part for part in paragraphs if len(part) >= SHARED}
    chosen = []
    for source, budget in BUDGET.items():
        spent = 0
        for text in (row["text"] for row in held_out if row["source"] == source):
            kept = "\n\n".join(unseen(text, training))
            if len(kept) >= SHARED and spent < budget:
                spent += len(kept)
                credit = {key: corpus[source][text][key] for key in CREDITS if corpus[source][text].get(key)}
                chosen.append({"source": source, **credit, "text": kept})
    return chosen


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", type=Path, required=True, help="held_out.jsonl of tools/pretrain/prepare.py")
    parser.add_argument("--corpus", type=Path, required=True, help="folder with corpus/<source>.jsonl.xz")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    held_out = [json.loads(line) for line in options.held_out.read_text(encoding="utf-8").split("\n") if line]
    rows = general_text(held_out, options.corpus)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    options.out.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    print(
        f"{len(rows)} rows {dict(Counter(row['source'] for row in rows))}, {len(text.encode())} bytes, {options.out.stat().st_size} zipped"
    )


if __name__ == "__main__":
    main()
