"""`fedgraft compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedgraft.cli.frame import AsJson, app, console, print_json
from fedgraft.cli.tables import print_cost, print_tables


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.")],
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with figures to this file.")] = None,
) -> None:
    """Compare runs: clients x methods, one table per figure."""
    from fedgraft.report.record import Record, resume_command
    from fedgraft.report.table import compare_tables, cost, labels

    records = [Record.load(folder) for folder in folders]
    for record in records:
        if not record.results:
            raise ValueError(f"{record.folder}: not evaluated yet; finish it with: {resume_command(record.folder)}")
    if html is not None:
        from fedgraft.report.html import comparison_page, write_page

        write_page(html, comparison_page(records))
    tables, names = compare_tables(records), labels(records)
    if as_json:
        runs = [
            {
                "name": name,
                "folder": str(record.folder),
                "method": record.method,
                "seed": record.recipe["seed"],
                "digest": record.digest,
                **cost(record),
            }
            for name, record in zip(names, records, strict=True)
        ]
        print_json({"runs": runs, "tables": [table.as_dict() for table in tables]})
        return
    print_tables(tables)
    for name, record in zip(names, records, strict=True):
        print_cost(name, record)
    if html is not None:
        console().print(f"page in {html}", markup=False, highlight=False, soft_wrap=True)
