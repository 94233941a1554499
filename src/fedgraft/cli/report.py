"""`fedgraft report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedgraft.cli.frame import app


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="One run folder, finished or not, or several to be set side by side.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The page to write (default: report.html in the run folder; comparison.html here for several runs)."),
    ] = None,
) -> None:
    """Write a page about a run, or about several, and print where it lies. It needs no network and no other file."""
    from fedgraft.report.html import NAME, comparison_page, run_page, write_page
    from fedgraft.report.record import Record

    records = [Record.load(folder) for folder in folders]
    alone = len(records) == 1
    path = out or (records[0].folder / NAME if alone else Path("comparison.html"))
    write_page(path, run_page(records[0]) if alone else comparison_page(records))
    typer.echo(path)
