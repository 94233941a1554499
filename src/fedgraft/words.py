"""Numbers and labelled lines for people: three significant digits and a unit, decimal (MB = 10^6 bytes)."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

PREFIXES = ("", "k", "M", "G", "T", "P")
COUNTS = ("", "k", "M", "B", "T", "Q")
SHOWN_SPANS = 4
LABEL = 10
UNIT = re.compile(r"(?<=\d) (?=[A-Za-z%])")
"""The space between a number and its unit."""


def count(number: float) -> str:
    """9437184 -> `9.44 M`, 14315784192 -> `14.3 B`; below 10,000 in full."""
    return f"{number:,.0f}" if abs(number) < 10_000 else _scaled(number, COUNTS).rstrip()


def size(number: float) -> str:
    """Bytes: 37748736 -> `37.7 MB`."""
    return f"{_scaled(number, PREFIXES)}B"


def flops(number: float) -> str:
    """Floating point operations: 1661000000 -> `1.66 GFLOP`."""
    return f"{_scaled(number, PREFIXES)}FLOP"


def duration(seconds: float) -> str:
    """`0.4 s`, `35 s`, `4 min`, `2.5 h`, `3 days`."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def percent(share: float) -> str:
    """0.125 -> `12.5 %`."""
    return f"{100 * share:.3g} %"


def spans(numbers: Sequence[int]) -> str:
    """Ascending layer numbers: `0-23`, `0-2, 4-6`, `1, 3, .., 23`; many short spans end in how many layers there are."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    step = numbers[1] - numbers[0] if len(numbers) > 3 else 1
    if step > 1 and list(numbers) == list(range(numbers[0], numbers[-1] + 1, step)):
        return f"{numbers[0]}, {numbers[1]}, .., {numbers[-1]}"
    words = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    if len(words) > SHOWN_SPANS:
        return f"{', '.join(words[: SHOWN_SPANS - 1])}, .., {words[-1]} ({len(numbers)})"
    return ", ".join(words)


def labelled(label: str, text: str, width: int) -> list[tuple[str, str]]:
    """(label, text) in lines of at most `width` characters, labels padded to a column; numbers stay with their units."""
    bound = UNIT.sub("\N{NO-BREAK SPACE}", text)
    lines = textwrap.wrap(bound, max(width - LABEL - 1, 20), break_on_hyphens=False) or [""]
    return [(f"{label if at == 0 else '':<{LABEL}}", line.replace("\N{NO-BREAK SPACE}", " ")) for at, line in enumerate(lines)]


def _scaled(number: float, prefixes: Sequence[str]) -> str:
    step = 0
    while abs(number) >= 999.5 and step < len(prefixes) - 1:
        number, step = number / 1000, step + 1
    return f"{number:.3g} {prefixes[step]}"
