"""Drawings as inline SVG: colours are classes of the style sheet, so that they follow light and dark; every one carries its numbers along.

Series differ in dash or shape as well as in colour. Coordinates are rounded to a tenth, which keeps pages of many clients small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise
from typing import Any

from fedgraft.report.blocks import Figure, Grid, Legend

WIDTH, HEIGHT = 420.0, 268.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 14.0, 30.0, 44.0
STYLES = 8  # distinct series of the style sheet: s0 ... s7; beside them base, mean and many
POINTS = 400  # of one curve; more cannot be told apart at this width
SERIES = "data-series"
BANDS = 3  # shaded at once; of more, each is shaded when the reader brings out its series
ROWS = 100  # clients in a drawing with a line for each
NAME = 26  # characters of a name that a drawing shows; tables show all
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve or cloud: its label ("" stays out of the legend), its class and its points; values that are no numbers leave a gap."""

    label: str
    style: str
    points: Sequence[Point]
    band: Sequence[Point] = ()
    """(lowest, highest) behind each point, shaded."""


@dataclass(frozen=True, kw_only=True)
class Axes:
    """A frame with linear axes."""

    x: Point
    y: Point
    height: float = HEIGHT
    left: float = LEFT
    top: float = TOP

    def at(self, point: Point) -> Point:
        """Data -> drawing."""
        across, up = ((value - low) / (high - low) for value, (low, high) in zip(point, (self.x, self.y), strict=True))
        return self.left + across * (WIDTH - self.left - RIGHT), self.height - BOTTOM - up * (self.height - BOTTOM - self.top)

    def frame(self, x_title: str, y_title: str, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> str:
        """Grid lines, ticks and titles."""
        parts, bottom = [], self.height - BOTTOM
        for tick in y_ticks:
            _, y = self.at((self.x[0], tick))
            parts.append(element("line", "grid", x1=self.left, x2=WIDTH - RIGHT, y1=y, y2=y))
            parts.append(element("text", "tick end", _number(tick, y_ticks), x=self.left - 7, y=y + 4))
        for tick in x_ticks:
            x, _ = self.at((tick, self.y[0]))
            parts.append(element("line", "axis", x1=x, x2=x, y1=bottom, y2=bottom + 4))
            parts.append(element("text", "tick middle", _number(tick, x_ticks), x=x, y=bottom + 18))
        parts.append(element("line", "axis", x1=self.left, x2=WIDTH - RIGHT, y1=bottom, y2=bottom))
        parts.append(element("text", "label middle", x_title, x=(self.left + WIDTH - RIGHT) / 2, y=self.height - 7))
        parts.append(element("text", "label", y_title, x=0, y=13))
        return "".join(parts)


def curves(
    name: str,
    title: str,
    description: str,
    series: Sequence[Series],
    data: Grid | None,
    *,
    x_title: str,
    y_title: str,
    x: Point,
    zero: bool = False,
    caption: str = "",
) -> Figure:
    """Curves over rounds `x` = (first, last), the last series on top; `zero`: the y axis starts there."""
    told = [value for one in series for _, value in one.points] + [value for one in series for ends in one.band for value in ends]
    values = [value for value in told if math.isfinite(value)] or [0.0]
    y_ticks = ticks(0.0 if zero else min(values), max(values))
    x = x if x[0] < x[1] else (x[0] - 0.5, x[1] + 0.5)
    x_ticks = [tick for tick in ticks(*x) if tick == int(tick) and x[0] <= tick <= x[1]]
    axes = Axes(x=x, y=(y_ticks[0], y_ticks[-1]))
    tags = _tags(series)
    quiet = " quiet" if sum(bool(one.band) for one in series) > BANDS else ""
    shaded = "".join(
        element("path", f"band {one.style}{quiet}", d=path, **tag)
        for one, tag in zip(series, tags, strict=True)
        for path in _bands(axes, one)
    )
    drawn = "".join(
        element("path", f"line {one.style}", d=path, **tag)
        for one, tag in zip(series, tags, strict=True)
        for path in _paths(axes, one.points)
    )
    marked = "".join(
        _mark(one.style, *axes.at(one.points[0]), **tag)
        for one, tag in zip(series, tags, strict=True)
        if len(one.points) == 1 and math.isfinite(one.points[0][1])
    )
    curved = any(len(one.points) > 1 for one in series)
    legend = [
        Legend(mark=element("path", f"line {one.style}", d="M1 6H29") if curved else _mark(one.style, 15, 6), label=one.label)
        for one in series
        if one.label
    ]
    return Figure(
        name=name,
        title=title,
        description=description,
        svg=axes.frame(x_title, y_title, x_ticks, y_ticks) + shaded + drawn + marked,
        width=WIDTH,
        height=HEIGHT,
        caption=caption,
        legend=legend if len(series) > 1 else (),
        data=data,
    )


def scatter(name: str, title: str, description: str, series: Sequence[Series], data: Grid, *, x_title: str, y_title: str) -> Figure:
    """Points of several clouds; the x axis starts at 0."""
    every = [point for one in series for point in one.points]
    x_ticks, y_ticks = ticks(0.0, max(x for x, _ in every)), ticks(min(y for _, y in every), max(y for _, y in every))
    axes = Axes(x=(x_ticks[0], x_ticks[-1]), y=(y_ticks[0], y_ticks[-1]))
    return Figure(
        name=name,
        title=title,
        description=description,
        svg=axes.frame(x_title, y_title, x_ticks, y_ticks)
        + "".join(_mark(one.style, *axes.at(point), **tag) for one, tag in zip(series, _tags(series), strict=True) for point in one.points),
        width=WIDTH,
        height=HEIGHT,
        legend=[Legend(mark=_mark(one.style, 15, 6), label=one.label) for one in series],
        data=data,
    )


def dots(
    name: str, title: str, description: str, rows: Mapping[str, Mapping[str, float]], styles: Mapping[str, str], *, x_title: str
) -> Figure:
    """A line per client with a mark per column (`styles`: column -> class), joined from its lowest to its highest value.

    Its numbers are those of a table of the same section. Of very many clients the first are drawn.
    """
    drawn = dict(list(rows.items())[:ROWS])
    if len(rows) > ROWS:
        description += f" Drawn are the first {ROWS} of {len(rows)} clients."
    rows = drawn
    values = [value for row in rows.values() for value in row.values() if math.isfinite(value)] or [0.0]
    left = label_width(rows)
    x_ticks = ticks(min(values), max(values), 4)
    axes = Axes(x=(x_ticks[0], x_ticks[-1]), y=(len(rows) - 0.4, -0.6), height=8 + 22.0 * len(rows) + BOTTOM, left=left, top=8.0)
    parts, columns = [], list(styles)
    for number, (client, row) in enumerate(rows.items()):
        at = {column: axes.at((value, number)) for column, value in row.items() if column in styles and math.isfinite(value)}
        _, y = axes.at((x_ticks[0], number))
        parts.append(element("line", "grid", x1=left, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(element("text", "tick end", short(client), x=left - 10, y=y + 4))
        if at:
            parts.append(element("line", "span", x1=min(x for x, _ in at.values()), x2=max(x for x, _ in at.values()), y1=y, y2=y))
        parts.extend(_mark(styles[column], *point, **{SERIES: columns.index(column)}) for column, point in at.items())
    return Figure(
        name=name,
        title=title,
        description=description,
        svg=axes.frame(x_title, "", x_ticks, ()) + "".join(parts),
        width=WIDTH,
        height=axes.height,
        legend=[Legend(mark=_mark(style, 15, 6), label=column) for column, style in styles.items()],
        data=None,
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, about `count` of them, the first at or below `low`, the last at or above `high`."""
    size = max(abs(low), abs(high))
    if high - low <= 1e-12 + 1e-9 * size:  # flat
        margin = 0.5 * size if size > 1e-9 else 0.5
        low, high = low - margin, high + margin
    rough = (high - low) / max(1, count - 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def element(tag: str, style: str, text: str | None = None, **attributes: Any) -> str:
    """One SVG element, everything escaped."""
    told = "".join(f' {name}="{f"{value:.1f}" if isinstance(value, float) else escape(str(value))}"' for name, value in attributes.items())
    return f'<{tag} class="{style}"{told}' + ("/>" if text is None else f">{escape(text)}</{tag}>")


def _paths(axes: Axes, points: Sequence[Point]) -> Iterator[str]:
    """The curve as path data, one for each stretch without a gap, thinned to POINTS."""
    kept = points[:: max(1, math.ceil(len(points) / POINTS))]
    for whole, stretch in groupby(kept, key=lambda point: math.isfinite(point[1])):
        if whole:
            yield "M" + "L".join("{:.1f} {:.1f}".format(*axes.at(point)) for point in stretch)


def _bands(axes: Axes, series: Series) -> Iterator[str]:
    """What is shaded behind a curve: along the highest values and back along the lowest, between gaps."""
    if not series.band:
        return
    edges = [(x, *ends) for (x, _), ends in zip(series.points, series.band, strict=True)]
    kept = edges[:: max(1, math.ceil(len(edges) / POINTS))]
    for whole, stretch in groupby(kept, key=lambda edge: math.isfinite(edge[1]) and math.isfinite(edge[2])):
        if whole:
            side = list(stretch)
            round_trip = [(x, high) for x, _, high in side] + [(x, low) for x, low, _ in reversed(side)]
            yield "M" + "L".join("{:.1f} {:.1f}".format(*axes.at(point)) for point in round_trip) + "z"


SHAPES = (  # so that series are told apart without colours
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "M-4 -4h8v8h-8z",
    "M0 -5.4L5.2 3.8H-5.2z",
    "M0 -5.8L5.8 0L0 5.8L-5.8 0z",
)
CROSS = "M-1.6 -5.6h3.2v4h4v3.2h-4v4h-3.2v-4h-4v-3.2h4z"  # for styles without a number


def _mark(style: str, x: float, y: float, **attributes: Any) -> str:
    number = style.split(maxsplit=1)[0][1:]
    shape = SHAPES[(int(number) + int(number) // len(SHAPES)) % len(SHAPES)] if number.isdigit() else CROSS
    return element("path", f"mark {style}", d=shape, transform=f"translate({x:.1f} {y:.1f})", **attributes)


def _tags(series: Sequence[Series]) -> list[dict[str, Any]]:
    """For each series what names its entry in the legend, by which the reader brings it out; nothing without one."""
    labelled = [one for one in series if one.label]
    return [{SERIES: labelled.index(one)} if one.label and len(labelled) > 1 else {} for one in series]


def _number(value: float, among: Sequence[float]) -> str:
    """A tick with as many digits as its neighbours need."""
    step = min((abs(b - a) for a, b in pairwise(among)), default=1.0)
    if value and (max(map(abs, among)) >= 1e6 or step < 1e-4):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def short(name: str) -> str:
    """A name as a drawing shows it."""
    return name if len(name) <= NAME else name[: NAME - 1] + "…"


def label_width(names: Mapping[str, object]) -> float:
    """Room for row names of a drawing."""
    return 18 + 6.6 * max(len(short(name)) for name in names)
