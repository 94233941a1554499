"""`fedgraft run` and `fedgraft resume`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgraft.cli.frame import AsJson, IsQuiet, IsVerbose, app, print_json, reporting, starting
from fedgraft.cli.rehearse import rehearse
from fedgraft.cli.tables import print_cost, print_tables

if TYPE_CHECKING:
    from fedgraft.report.record import Record


@app.command()
def run(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file or the name of a shipped recipe; without one, the embedded demo.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="New folder for the run (default: runs/<method>-<time>).")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: section.key=value. Repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Go through everything up to the first step; write nothing.")] = False,
    on: Annotated[
        str | None, typer.Option("--on", help="Run on the sites of a federation, whose coordinator runs here: its folder or name.")
    ] = None,
    as_json: AsJson = False,
    quiet: IsQuiet = False,
    verbose: IsVerbose = False,
) -> None:
    """Run a recipe and print its tables."""
    if dry_run and on is not None:
        raise ValueError("--dry-run: rehearses on this machine's rows, which sites replace by their own; leave it out, or leave out --on")
    if dry_run:
        rehearse(recipe, out, set_, as_json=as_json, quiet=quiet)
        return
    with reporting(quiet or as_json, verbose) as progress:
        with starting(quiet or as_json):
            from fedgraft.runner import run as execute
        if on is not None:
            from fedgraft.deployment.submission import run_on

            record = run_on(on, recipe, out=out, overrides=set_, progress=progress)
        else:
            record = execute(recipe, out=out, overrides=set_, progress=progress)
    _show_run(record, as_json)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    rounds: Annotated[int | None, typer.Option("--rounds", help="Extend the run to so many rounds.")] = None,
    on: Annotated[str | None, typer.Option("--on", help="Folder or name of the run's federation, if it has moved.")] = None,
    as_json: AsJson = False,
    quiet: IsQuiet = False,
    verbose: IsVerbose = False,
) -> None:
    """Continue a run that was stopped, or extend a finished one, where it ran: here, or on its federation."""
    with reporting(quiet or as_json, verbose, folder) as progress:
        with starting(quiet or as_json):
            from fedgraft.deployment.job import origin
            from fedgraft.runner import resume as execute
        place = on or origin(folder)
        if place is not None:
            from fedgraft.deployment.submission import resume_on

            record = resume_on(place, folder, rounds=rounds, progress=progress)
        else:
            record = execute(folder, rounds=rounds, progress=progress)
    _show_run(record, as_json)


def _show_run(record: Record, as_json: bool) -> None:
    from fedgraft.report.table import cost, further_tables, run_tables

    tables = [*run_tables(record), *further_tables(record)]
    if as_json:
        print_json(
            {
                "folder": str(record.folder),
                "method": record.method,
                "digest": record.digest,
                **cost(record),
                **{name: record.further[name] for name in ("privacy",) if name in record.further},
                "tables": [table.as_dict() for table in tables],
            }
        )
        return
    print_tables(tables)
    print_cost(record.method, record)
