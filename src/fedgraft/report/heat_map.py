"""Heat maps: fields of a fixed colour scale, readable by the number in each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from fedgraft.report.blocks import Figure, Grid
from fedgraft.report.figures import element, label_width, short

VIRIDIS = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
FIELDS = 8_000  # of one heat map
MOST = 200  # rows of one: more can be scrolled through, but not taken in
EVEN = 0.179  # luminance on which black and white read equally well: (1.05 / (L + 0.05) = (L + 0.05) / 0.05)


@dataclass(frozen=True, kw_only=True)
class Shade:
    """One field of a heat map."""

    text: str
    """What stands in it."""
    level: float
    """Where on the colour scale it lies, from 0 to 1."""
    exact: str
    """What stands in the table."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """What the rows and columns of a heat map are, in the singular and the plural; `names` of the columns where they are not numbered."""

    row: str = "client"
    rows: str = "clients"
    column: str = "MoE layer"
    columns: str = "MoE layers"
    names: Sequence[str] = ()


CLIENTS_BY_LAYERS = Sides()


def heat_map(
    name: str,
    title: str,
    description: str,
    rows: Mapping[str, Sequence[Sequence[Shade]]],
    *,
    scale: tuple[str, str],
    caption: str,
    sides: Sides = CLIENTS_BY_LAYERS,
) -> Figure:
    """Rows x columns, each field split side by side where it has several shades; `scale` names both ends of the colours.

    A page stays small: of very many rows the first are shown, and the caption says so.
    """
    room = min(MOST, max(1, FIELDS // max(1, sum(map(len, next(iter(rows.values())))))))
    count = len(rows)
    if count > room:
        rows = dict(list(rows.items())[:room])
        caption += f" Shown are the first {room} of {count} {sides.rows}; the record holds all."
    cells = [[heading, *(", ".join(shade.exact for shade in cell) for cell in row)] for heading, row in rows.items()]
    columns = sides.names or [str(number) for number in range(max(len(row) for row in rows.values()))]
    drawing, width, height = _draw(rows, columns)
    return Figure(
        name=name,
        title=title,
        description=description,
        svg=drawing,
        width=width,
        height=height,
        caption=f"{caption} Rows are {sides.rows}, columns are {sides.columns}.",
        scale=scale,
        data=Grid(caption=f"{title} per {sides.row} and {sides.column}", columns=[sides.row, *columns], rows=cells),
        natural=True,
    )


def _draw(rows: Mapping[str, Sequence[Sequence[Shade]]], columns: Sequence[str]) -> tuple[str, float, float]:
    """(elements, width, height); fields of one colour share a path, texts of one colour an element, which keeps the page small."""
    left, tall = label_width(rows), 24.0
    split = max(len(cell) for row in rows.values() for cell in row)
    letters = max(len(shade.text) for row in rows.values() for cell in row for shade in cell)
    wide = max(18.0, 7.0 * letters + 8)
    pitch, longest = wide * split + 3, 6.6 * max(map(len, columns))
    upright = longest > pitch and not all(name.isdigit() for name in columns)  # numbers may stand over every second column
    top = label_width(dict.fromkeys(columns)) if upright else 26.0
    fields: list[tuple[str, bool, float, float, str]] = []
    for line, row in enumerate(rows.values()):
        for column, cell in enumerate(row):
            for part, shade in enumerate(cell):
                x, y = left + column * pitch + part * wide, top + line * (tall + 2)
                fields.append((*_viridis(shade.level), x, y, shade.text))
    parts = [element("text", "tick end", short(heading), x=left - 8, y=top + n * (tall + 2) + 16) for n, heading in enumerate(rows)]
    every = 1 if upright or longest <= pitch else 2
    for number, heading in list(enumerate(columns))[::every]:
        x, y = left + number * pitch + wide * split / 2, top - 8
        turned = {"transform": f"translate({x + 4:.1f} {y:.1f}) rotate(-90)"} if upright else {"x": x, "y": y}
        parts.append(element("text", "tick" if upright else "tick middle", short(heading), **turned))
    for colour, same in groupby(sorted(fields), key=lambda field: field[0]):
        parts.append(f'<path fill="#{colour}" d="{"".join(f"M{x:g} {y:g}h{wide:g}v{tall:g}h-{wide:g}z" for _, _, x, y, _ in same)}"/>')
    for bright, same in groupby(sorted(fields, key=lambda field: field[1:4]), key=lambda field: field[1]):
        spans = "".join(f'<tspan x="{x + wide / 2:g}" y="{y + 16:g}">{escape(text)}</tspan>' for _, _, x, y, text in same)
        parts.append(f'<text class="{"on-bright" if bright else "on-dark"}">{spans}</text>')
    return "".join(parts), left + len(columns) * pitch, top + len(rows) * (tall + 2)


def _viridis(level: float) -> tuple[str, bool]:
    """(colour, whether black reads better on it than white) at a level from 0 to 1; grey where there is none."""
    if not math.isfinite(level):
        return "8a8a8a", True
    place = min(max(level, 0.0), 1.0) * (len(VIRIDIS) - 1)
    at = min(int(place), len(VIRIDIS) - 2)
    low, high = (bytes.fromhex(colour) for colour in VIRIDIS[at : at + 2])
    mixed = bytes(round(a + (b - a) * (place - at)) for a, b in zip(low, high, strict=True))
    return mixed.hex(), luminance(mixed) > EVEN


def luminance(colour: bytes) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.2), from 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
