"""Tables in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedgraft.cli.frame import console

if TYPE_CHECKING:
    from fedgraft.report.choose import Choice
    from fedgraft.report.over_seeds import SeedTable
    from fedgraft.report.record import Record
    from fedgraft.report.table import Table

MOST_COLUMNS = 8  # of runs that a terminal has room for
MOST_CLIENTS = 100  # of a table; more scroll out of sight, and the record has them
WIDEST_NAME = 36


def print_tables(tables: list[Table]) -> None:
    """Each figure as a table of clients x runs with summary rows; of more runs than fit, the summary alone, a line per run."""
    for table in tables:
        console().print(table.title, style="bold", highlight=False, soft_wrap=True)
        console().print(_upright(table) if len(table.columns) <= MOST_COLUMNS else _on_its_side(table))


def _upright(table: Table) -> Any:
    from rich.table import Table as RichTable

    drawn = RichTable("client")
    for name in table.columns:
        drawn.add_column(name, justify="right")
    for client, values in list(table.clients.items())[:MOST_CLIENTS]:
        drawn.add_row(client, *(_cell(table, values, name) for name in table.columns))
    if (more := len(table.clients) - MOST_CLIENTS) > 0:
        drawn.add_row(f"and {more} more", style="dim")
    drawn.add_section()
    for row, values in table.summary.items():
        drawn.add_row(row, *(_cell(table, values, name) for name in table.columns), style="bold" if row == "mean" else None)
    return drawn


def _on_its_side(table: Table) -> Any:
    from rich.table import Table as RichTable

    drawn = RichTable()
    drawn.add_column("run", overflow="fold", min_width=min(WIDEST_NAME, max(map(len, table.columns))))
    for title in table.summary:
        drawn.add_column(title, justify="right", style="bold" if title == "mean" else None)
    for name in table.columns:
        drawn.add_row(name, *(_cell(table, values, name) for values in table.summary.values()))
    return drawn


def _cell(table: Table, values: Mapping[str, float], name: str) -> str:
    return f"{values[name]:.{table.digits}f}" if name in values else "-"


def print_over_seeds(tables: list[SeedTable]) -> None:
    """Each figure as a table of groups, with mean, deviation and tests."""
    from rich.table import Table as RichTable

    from fedgraft.report.over_seeds import EXPLANATION

    for table in tables:
        first, *others = table.columns
        drawn = RichTable()
        drawn.add_column(first, overflow="fold", min_width=min(WIDEST_NAME, max(len(row.name) for row in table.rows)))
        for name in others:
            drawn.add_column(name, justify="right")
        for cells in table.cells():
            drawn.add_row(*cells)
        console().print(table.heading, style="bold", highlight=False, soft_wrap=True, markup=False)
        console().print(drawn)
    console().print(EXPLANATION, style="dim", highlight=False, soft_wrap=True)


def print_choices(choices: list[Choice], figure: str) -> None:
    """The best setting of each method, and the same as the section `per_method` of a sweep file."""
    from rich.table import Table as RichTable

    from fedgraft.report.table import described
    from fedgraft.starter.keys import as_yaml

    heading, _, digits = described(figure)
    drawn = RichTable("method")
    drawn.add_column("best setting", overflow="fold")
    for name in ("value", "next best", "candidates", "seeds"):
        drawn.add_column(name, justify="right")
    for choice in choices:
        settings = "\n".join(f"{key} = {value}{' (edge)' if key in choice.edges else ''}" for key, value in choice.settings.items())
        following = "-" if choice.runner_up is None else f"{choice.runner_up:.{digits}f}"
        seeds = ", ".join(map(str, choice.seeds))
        drawn.add_row(
            choice.method, settings or "nothing else was tried", f"{choice.value:.{digits}f}", following, str(choice.candidates), seeds
        )
    console().print(f"best by {heading}, validation rows", style="bold", highlight=False, soft_wrap=True, markup=False)
    console().print(drawn)
    if any(choice.edges for choice in choices):
        text = "edge: the lowest or highest value that was tried, so a better one may lie beyond; widen the grid"
        console().print(text, style="yellow", highlight=False, soft_wrap=True)
    console().print("For a sweep file:", style="bold", highlight=False)
    lines = ["per_method:", *(f"  {choice.method}: {as_yaml(choice.settings)}" for choice in choices if choice.settings)]
    console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def print_cost(name: str, record: Record) -> None:
    """One line on rounds, seconds and bytes, and where the results lie."""
    from fedgraft.report.html import NAME
    from fedgraft.report.shaping import budget
    from fedgraft.report.table import cost

    figures = cost(record)
    up, down = figures["bytes_up_per_round"] / 1e6, figures["bytes_down_per_round"] / 1e6
    line = f"{name}: {figures['rounds']} round{'' if figures['rounds'] == 1 else 's'} in {figures['training_seconds']:.0f} s, "
    line += f"{up:.2f} MB up and {down:.2f} MB down a round (fp32, all clients)"
    if spent := record.further.get("privacy"):
        line += f"; privacy spent: {budget(spent)}"
    page = record.folder / NAME
    where = f"results in {record.folder}" + (f", to look at: {page}" if page.exists() else "")
    console().print(f"{line}\n  {where}", highlight=False, soft_wrap=True)
