"""The shipped general text, in two parts that never meet: one to measure what knowledge a model keeps, one to calibrate on."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fedgraft.data.example import read_rows

FILE = Path(__file__).parents[1] / "assets" / "general_text.jsonl.gz"


def general_texts() -> tuple[str, ...]:
    """The documents that knowledge is measured on; nothing is trained, chosen or calibrated by them."""
    return tuple(text for at, text in enumerate(_texts()) if not _calibrates(at))


def calibration_texts() -> tuple[str, ...]:
    """The documents for `selection.text: generic`."""
    return tuple(text for at, text in enumerate(_texts()) if _calibrates(at))


def _calibrates(at: int) -> bool:
    """Every other document of the second half, so that the sources there are in both parts."""
    return at >= len(_texts()) // 2 and at % 2 == 1


@cache
def _texts() -> tuple[str, ...]:
    return tuple(row["text"] for _, row in read_rows(FILE))
