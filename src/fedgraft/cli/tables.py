"""Tables in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedgraft.cli.frame import console

if TYPE_CHECKING:
    from fedgraft.report.over_seeds import SeedTable
    from fedgraft.report.record import Record
    from fedgraft.report.table import Table


def print_tables(tables: list[Table]) -> None:
    """Each figure as a table with its summary rows."""
    from rich.table import Table as RichTable

    for table in tables:
        drawn = RichTable("client")
        for name in table.columns:
            drawn.add_column(name, justify="right")
        for client, values in table.clients.items():
            drawn.add_row(client, *(f"{values[name]:.{table.digits}f}" if name in values else "-" for name in table.columns))
        drawn.add_section()
        for row, values in table.summary.items():
            style = "bold" if row == "mean" else None
            drawn.add_row(row, *(f"{values[name]:.{table.digits}f}" for name in table.columns), style=style)
        console().print(table.title, style="bold", highlight=False, soft_wrap=True)
        console().print(drawn)


def print_over_seeds(tables: list[SeedTable]) -> None:
    """Each figure as a table of groups, with mean, deviation and tests."""
    from rich.table import Table as RichTable

    from fedgraft.report.over_seeds import EXPLANATION

    for table in tables:
        first, *others = table.columns
        drawn = RichTable(first)
        for name in others:
            drawn.add_column(name, justify="right")
        for cells in table.cells():
            drawn.add_row(*cells)
        console().print(table.title, style="bold", highlight=False, soft_wrap=True)
        console().print(drawn)
    console().print(EXPLANATION, style="dim", highlight=False, soft_wrap=True)


def print_cost(name: str, record: Record) -> None:
    """One line on rounds, seconds and bytes, and where the results lie."""
    from fedgraft.report.html import NAME
    from fedgraft.report.table import cost

    figures = cost(record)
    up, down = figures["bytes_up_per_round"] / 1e6, figures["bytes_down_per_round"] / 1e6
    line = f"{name}: {figures['rounds']} round{'' if figures['rounds'] == 1 else 's'} in {figures['training_seconds']:.0f} s, "
    line += f"{up:.2f} MB up and {down:.2f} MB down a round (fp32, all clients)"
    page = record.folder / NAME
    where = f"results in {record.folder}" + (f", to look at: {page}" if page.exists() else "")
    console().print(f"{line}\n  {where}", highlight=False, soft_wrap=True)
