"""Bars: how a whole is divided, and how often what comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedgraft.report.blocks import Figure, Grid, Legend
from fedgraft.report.figures import BOTTOM, HEIGHT, ROWS, SHAPES, WIDTH, Axes, element, label_width, short, ticks

NARROW = 13.0  # a part below this width has no room for its mark


def stacked(
    name: str,
    title: str,
    description: str,
    rows: Mapping[str, Mapping[str, float]],
    parts: Sequence[str],
    *,
    x_title: str,
    data: Grid | None,
) -> Figure:
    """A bar per row, divided into `parts` in their order; parts differ in colour and, where there is room, in the mark they carry.

    Of very many rows the first are drawn.
    """
    if len(rows) > ROWS:
        description += f" Drawn are the first {ROWS} of {len(rows)}."
        rows = dict(list(rows.items())[:ROWS])
    left = label_width(rows)
    x_ticks = ticks(0.0, max(sum(row.values()) for row in rows.values()), 4)
    axes = Axes(x=(0.0, x_ticks[-1]), y=(len(rows) - 0.4, -0.6), height=8 + 22.0 * len(rows) + BOTTOM, left=left, top=8.0)
    drawn = []
    for number, (row, values) in enumerate(rows.items()):
        begin = 0.0
        for at, part in enumerate(parts):
            (x, y), (end, _) = axes.at((begin, number)), axes.at((begin + values.get(part, 0.0), number))
            begin += values.get(part, 0.0)
            if end > x:
                drawn.append(_part(at, x, y - 7, end - x, 14.0))
        drawn.append(element("text", "tick end", short(row), x=left - 10, y=axes.at((0.0, number))[1] + 4))
    return Figure(
        name=name,
        title=title,
        description=description,
        svg=axes.frame(x_title, "", x_ticks, ()) + "".join(drawn),
        width=WIDTH,
        height=axes.height,
        legend=[Legend(mark=_part(at, 4, 0, 22, 12), label=part) for at, part in enumerate(parts)],
        data=data,
    )


def histogram(
    name: str, title: str, description: str, shares: Sequence[float], ends: Sequence[tuple[float, float]], data: Grid, *, x_title: str
) -> Figure:
    """Shares of tokens in equal parts of 0 to 1, as bars; `ends`: of each the lowest and the highest over clients, as a line."""
    y_ticks = ticks(0.0, max(100 * high for _, high in ends) or 1.0)
    axes = Axes(x=(0.0, 1.0), y=(0.0, y_ticks[-1]))
    drawn = []
    for number, (share, (low, high)) in enumerate(zip(shares, ends, strict=True)):
        (x, top), (beyond, bottom) = axes.at((number / len(shares), 100 * share)), axes.at(((number + 1) / len(shares), 0.0))
        drawn.append(element("rect", "bar s0", x=x + 1.5, y=top, width=beyond - x - 3, height=max(0.0, bottom - top)))
        middle = (x + beyond) / 2
        drawn.append(element("line", "whisker", x1=middle, x2=middle, y1=axes.at((0.0, 100 * low))[1], y2=axes.at((0.0, 100 * high))[1]))
    return Figure(
        name=name,
        title=title,
        description=description,
        svg=axes.frame(x_title, "% of the tokens", ticks(0.0, 1.0), y_ticks) + "".join(drawn),
        width=WIDTH,
        height=HEIGHT,
        data=data,
    )


def _part(style: int, x: float, y: float, width: float, height: float) -> str:
    field = element("rect", f"bar s{style}", x=x, y=y, width=max(1.0, width - 1), height=height)
    if width < NARROW:
        return field
    centre = f"translate({x + width / 2:.1f} {y + height / 2:.1f}) scale(.8)"
    return field + element("path", "inlay", d=SHAPES[(style + style // len(SHAPES)) % len(SHAPES)], transform=centre)
