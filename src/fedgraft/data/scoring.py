"""How a row's answers are judged, where the row says so: by which of its choices is likeliest, or only when they are the response."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedgraft.data.example import text_of

METRICS = {"rougeL": False, "exact_match": True}
"""What a dataset or a row can name -> whether an answer has to be the response."""
OUTER = ".,;:!?\"'`*()[]{}"


def choices_of(row: Mapping[str, Any], response: str, place: str) -> tuple[str, ...]:
    """The field `choices`, empty without one.

    Raises:
        ValueError: it is no list of two texts or more that holds the response once.
    """
    given = row.get("choices")
    if given is None:
        return ()
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(f"{place}: field 'choices' must be a list of at least two answers")
    found = tuple(text_of({"choices": choice}, ["choices"], place) for choice in given)
    if found.count(response) != 1:
        raise ValueError(f"{place}: field 'choices' must hold the response {response!r} once; it holds {', '.join(map(repr, found))}")
    return found


def is_exact(row: Mapping[str, Any], place: str, default: str) -> bool:
    """Whether the field `metric`, or else the dataset's own, asks for an exact match.

    Raises:
        ValueError: an unknown metric.
    """
    metric = text_of(row, ["metric"], place, required=False) or default
    if metric not in METRICS:
        raise ValueError(f"{place}: unknown metric {metric!r}; there are {', '.join(METRICS)}, and a field 'choices' for multiple choice")
    return METRICS[metric]


def same_answer(answer: str, response: str) -> bool:
    """Equal but for case, white space and punctuation around it."""
    return _plain(answer) == _plain(response)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip(f"{OUTER} ").casefold()
