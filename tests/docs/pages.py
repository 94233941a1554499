"""The code blocks of README.md and docs/, and what the comments before them say about running them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RECORDS = ("results.md", "benchmarks.md")  # their commands were run to write them, and take hours
GENERATED = ("methods.md", "reference/recipe.md", "reference/cli.md", "reference/names.md")
WRITTEN = [
    ROOT / "README.md",
    *(page for page in sorted(DOCS.rglob("*.md")) if page.relative_to(DOCS).as_posix() not in RECORDS + GENERATED),
]
MARK = re.compile(r"<!-- (not run|run smaller|begins with): (.*?) -->")
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block; the marks stand as comments on the lines right above it."""

    language: str
    title: str
    text: str
    line: int
    marks: dict[str, str]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page from top to bottom."""
    source = page.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(source):
        above = source[: fence.start()].rstrip("\n").split("\n")
        marks: dict[str, str] = {}
        while above and (mark := MARK.fullmatch(above.pop())):
            marks[mark[1]] = mark[2].strip()
        found.append(Block(fence[1], fence[2] or "", fence[3], source[: fence.start()].count("\n") + 1, marks))
    return found


def commands(text: str) -> list[str]:
    """The commands of a shell block: continued lines joined, comments and blank lines left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
