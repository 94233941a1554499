"""`fedgraft compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgraft.cli.frame import AsJson, app, console, print_json
from fedgraft.cli.tables import print_choices, print_cost, print_over_seeds, print_tables

if TYPE_CHECKING:
    from fedgraft.report.record import Record


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or sweep folders for all their finished runs.")],
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with figures to this file.")] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="Runs that the others are tested against, by their name in the table [default: the first]."),
    ] = None,
    choose: Annotated[
        str | None,
        typer.Option("--choose", help="Instead, print the best setting of each method by this figure, such as loss, of validation rows."),
    ] = None,
) -> None:
    """Compare runs, one table per figure: clients x methods, with mean, deviation and a paired test over runs that differ only in seed."""
    from fedgraft.report.groups import labels
    from fedgraft.report.over_seeds import seed_tables, several_seeds
    from fedgraft.report.record import check_one_split
    from fedgraft.report.table import compare_tables

    records = _records(folders)
    if choose is not None:
        _choose(records, choose, as_json)
        _say_unfinished(folders, len(records))
        return
    check_one_split(records)
    if html is not None:
        from fedgraft.report.html import comparison_page, write_page

        write_page(html, comparison_page(records, baseline))
    if as_json:
        print_json(comparison(records, baseline))
        return
    tested = seed_tables(records, baseline)
    print_tables(compare_tables(records))
    if several_seeds(records):
        print_over_seeds(tested)
    for name, record in zip(labels(records), records, strict=True):
        print_cost(name, record)
    if html is not None:
        console().print(f"page in {html}", markup=False, highlight=False, soft_wrap=True)


def _choose(records: list[Record], figure: str, as_json: bool) -> None:
    from fedgraft.report.choose import SPLIT, choose

    choices = choose(records, figure)
    if as_json:
        print_json({"split": SPLIT, "figure": figure, "choices": [choice.as_dict() for choice in choices]})
        return
    print_choices(choices, figure)


def _say_unfinished(folders: list[Path], finished: int) -> None:
    from fedgraft.report.record import sweep_runs

    known = sum(len(sweep_runs(folder) or [folder]) for folder in folders)
    if known > finished:
        text = f"{known - finished} of {known} runs are not finished and not among the candidates"
        console(stderr=True).print(text, style="yellow", highlight=False, soft_wrap=True)


def comparison(records: list[Record], baseline: str | None) -> dict[str, Any]:
    """The comparison as one document."""
    from fedgraft.report.groups import grouped, labels
    from fedgraft.report.over_seeds import seed_tables
    from fedgraft.report.table import compare_tables, cost

    groups = {str(record.folder): group.name for group in grouped(records) for record in group.runs}
    runs = [
        {
            "name": name,
            "group": groups[str(record.folder)],
            "folder": str(record.folder),
            "method": record.method,
            "seed": record.recipe["seed"],
            "digest": record.digest,
            **cost(record),
        }
        for name, record in zip(labels(records), records, strict=True)
    ]
    return {
        "runs": runs,
        "tables": [table.as_dict() for table in compare_tables(records)],
        "over_seeds": [table.as_dict() for table in seed_tables(records, baseline)],
    }


def _records(folders: list[Path]) -> list[Record]:
    """The runs of these folders; of a sweep those that are finished.

    Raises:
        ValueError: a run that is not evaluated yet, or a sweep without a finished run.
    """
    from fedgraft.report.record import Record, resume_command, sweep_runs

    records = []
    for folder in folders:
        runs = sweep_runs(folder)
        if runs is not None:
            finished = [record for run in runs if (run / "recipe.yaml").is_file() and (record := Record.load(run)).finished]
            if not finished:
                raise ValueError(f"{folder}: no run of this sweep is finished yet; go on with the fedgraft sweep that began it")
            records += finished
            continue
        records.append(record := Record.load(folder))
        if not record.results:
            raise ValueError(f"{record.folder}: not evaluated yet; finish it with: {resume_command(record.folder)}")
    return records
