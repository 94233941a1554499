"""From records to what blocks hold: the helpers that sections share."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedgraft.report.blocks import Grid, Note, Section
from fedgraft.report.figures import STYLES
from fedgraft.report.record import Record
from fedgraft.report.table import FROM, TO, Table, described

GAINS = ("gain over base", "gain over local")
MANY = 8
"""Columns of a table that can be taken in side by side; more become its rows, where they can be sorted."""
LISTED = 500
"""Clients of a table; of more the first are listed, since a page is to be opened anywhere."""
WITHHELD = "Under differential privacy clients do not tell their losses, tokens, times and choices."
RESUME = "fedgraft resume ."
"""How a run goes on, said in its own folder, where its page lies."""


def absent(name: str, title: str, text: str, missing: bool = True) -> Section:
    """A section with nothing but the reason why; `missing`: the run has not come so far, rather than having no such thing."""
    return Section(name=name, title=title, blocks=[Note(text=text, missing=missing)])


def headline(tables: Sequence[Table], columns: str) -> Grid:
    """Mean and worst client of every figure, with the interval of the mean and the gains where any figure has them.

    Of many columns only the means, a row for each.
    """
    names = list(dict.fromkeys(name for table in tables for name in table.columns))
    if len(names) > MANY:
        return _by_column(tables, columns, names)
    rows: list[list[str]] = []
    leading = []
    for table in tables:
        leading.append(len(rows))
        rows.append([_heading(table), *(value(table.summary["mean"], name, table.digits) for name in names)])
        if FROM in table.summary:
            rows.append(["mean, 95 % interval", *(_interval(table, name) or "–" for name in names)])
        rows.extend(
            [row, *(value(table.summary[row], name, table.digits, "+z") for name in names)] for row in GAINS if row in table.summary
        )
        for row, label in (("std", "deviation over clients"), ("worst", "worst client")):
            rows.append([label, *(value(table.summary[row], name, table.digits) for name in names)])
    return Grid(caption=f"All clients: figures x {columns}", columns=["figure", *names], rows=rows, leading=leading)


def _by_column(tables: Sequence[Table], columns: str, names: Sequence[str]) -> Grid:
    rows = []
    for name in names:
        cells = [value(table.summary["mean"], name, table.digits) for table in tables]
        told = [_interval(table, name) for table in tables]
        rows.append([name, *(f"{cell} ({interval})" if interval else cell for cell, interval in zip(cells, told, strict=True))])
    caption = "Mean over clients" + (", with its 95 % interval" if any(FROM in table.summary for table in tables) else "")
    return Grid(caption=f"{caption}: {columns} x figures", columns=[columns, *map(_heading, tables)], rows=rows)


def _heading(table: Table) -> str:
    return f"{table.title}, {'higher is better' if described(table.figure)[1] else 'lower is better'}"


def _interval(table: Table, name: str) -> str:
    ends = [table.summary.get(row, {}).get(name) for row in (FROM, TO)]
    return " to ".join(f"{end:.{table.digits}f}" for end in ends if end is not None) if None not in ends else ""


def grid(table: Table, column: str = "model") -> Grid:
    """A figure's clients x columns with their summary; of many columns each, a `column`, is a row, and the summary comes first."""
    clients, feet = (
        [[name, *(value(row, one, table.digits) for one in table.columns)] for name, row in rows.items()]
        for rows in (table.clients, table.summary)
    )
    clients, caption = listed(clients, table.title)
    columns = ["client", *table.columns]
    if len(table.columns) > max(MANY, len(clients)):
        return turned(Grid(caption=caption, columns=columns, rows=[*feet, *clients]), column)
    return Grid(caption=caption, columns=columns, rows=clients, feet=feet)


def listed(rows: list[list[str]], caption: str) -> tuple[list[list[str]], str]:
    """The rows of clients that a table has room for, and its caption, which says so where these are not all."""
    if len(rows) <= LISTED:
        return rows, caption
    return rows[:LISTED], f"{caption}; the first {LISTED} of {len(rows)} clients, the record has all"


def turned(table: Grid, column: str) -> Grid:
    """The same with its rows as columns, so that what were columns can be sorted."""
    heads, *columns = zip(table.columns, *table.rows, strict=True)
    return replace(table, columns=[column, *heads[1:]], rows=columns)


def styles(names: Sequence[str]) -> dict[str, str]:
    """Name -> class of its marks and curves, the same in every figure of a page."""
    others = [name for name in names if name != "base"]
    return {name: "base" if name == "base" else _style(others.index(name)) for name in names}


def _style(number: int) -> str:
    """Eight full ones, eight hollow ones, then these again."""
    return f"s{number % STYLES}{' hollow' if number // STYLES % 2 else ''}"


def span_of(record: Record) -> tuple[float, float]:
    """First and last planned round; a run that stopped shows the room that is left."""
    return 1, max(1, int(record.recipe.get("federation", {}).get("rounds", 1)), len(record.rounds))


def mean_losses(record: Record) -> list[tuple[float, float]]:
    """(round, mean training loss over its clients)."""
    return [(line["round"] + 1, number(line.get("loss"))) for line in record.rounds]


def number(value: Any) -> float:
    """A figure of a round; not a number where there is none."""
    return float(value) if isinstance(value, int | float) else math.nan


def flat(values: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{head}{name}.")
        else:
            yield f"{head}{name}", value


def shown(value: Any) -> str:
    """A setting as people write it."""
    if isinstance(value, list | tuple):
        return ", ".join(shown(one) for one in value) or "none"
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def value(row: Mapping[Any, float], name: Any, digits: int, sign: str = "") -> str:
    """A table's cell; a dash where nothing was measured."""
    return f"{row[name]:{sign}.{digits}f}" if name in row else "–"


def counted(number: int | None) -> str:
    """A count that clients may keep to themselves."""
    return "–" if number is None else f"{number:,}"


def budget(privacy: Mapping[str, Any]) -> str:
    """What a record says was spent."""
    if privacy.get("epsilon") is None:
        return "no guarantee (without a clip and noise epsilon has no bound)"
    return f"epsilon {privacy['epsilon']:.3g} at delta {privacy['delta']:g} for {privacy['of']}"


def percents(share: float) -> str:
    """A share as per cent with two digits."""
    return f"{100 * share:.2f} %"
