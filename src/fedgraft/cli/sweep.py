"""`fedgraft sweep`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgraft.cli.frame import AsJson, IsQuiet, app, console, print_json, reporting, starting
from fedgraft.cli.tables import print_over_seeds

if TYPE_CHECKING:
    from fedgraft.report.record import Record
    from fedgraft.sweep.execute import Outcome
    from fedgraft.sweep.plan import Point


@app.command()
def sweep(
    recipe: Annotated[str, typer.Argument(help="A recipe, or a sweep file: a recipe with grid, variants or per_method; or a shipped one.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[KEY=V1,V2]...", help="Further grids.")] = None,
    grid: Annotated[list[str] | None, typer.Option("--grid", help="key=value,value: every combination is a run. Repeatable.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the sweep, new or old (default: runs/sweep-<recipe>).")] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="Runs at a time, each in a process of its own.")] = 1,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key of all runs: section.key=value. Repeatable.")] = None,
    as_json: AsJson = False,
    quiet: IsQuiet = False,
) -> None:
    """Run a grid of recipes; finished runs are skipped, stopped and failed ones continued."""
    folder = out or Path("runs") / f"sweep-{Path(recipe).stem}"
    with reporting(quiet or as_json, again=_again()) as progress:
        with starting(quiet or as_json):
            from fedgraft.sweep.execute import execute
            from fedgraft.sweep.plan import plan
        points = plan(recipe, [*(grid or []), *(more or [])], set_)
        outcome = execute(folder, points, jobs=jobs, progress=progress)
    _show(points, outcome, as_json)
    if outcome.failures:
        raise typer.Exit(2)


def _again() -> str:
    """The command that was typed."""
    from fedgraft.report.record import QUOTE

    return " ".join(["fedgraft", *map(QUOTE, sys.argv[1:])])


def _show(points: list[Point], outcome: Outcome, as_json: bool) -> None:
    from fedgraft.cli.compare import comparison
    from fedgraft.report.record import Record

    records = [Record.load(outcome.folder / name) for name in outcome.finished]
    if as_json:
        rows = [_row(point, outcome) for point in points]
        print_json({"folder": str(outcome.folder), "points": rows, **(comparison(records, None) if records else {})})
        return
    if records:
        _print(records)
    done = f"{len(outcome.finished)} of {len(points)} runs finished in {outcome.folder}"
    console().print(f"{done}; compare them with: fedgraft compare {outcome.folder}", markup=False, highlight=False, soft_wrap=True)
    for name, reason in outcome.failures.items():
        console(stderr=True).print(f"{name}: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    if outcome.failures:
        text = f"{len(outcome.failures)} failed; start them again with: {_again()}"
        console(stderr=True).print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _print(records: list[Record]) -> None:
    from fedgraft.report.over_seeds import seed_tables

    print_over_seeds(seed_tables(records))


def _row(point: Point, outcome: Outcome) -> dict[str, Any]:
    state = "finished" if point.name in outcome.finished else "failed"
    reason = outcome.failures.get(point.name, "")
    return {"name": point.name, "folder": str(outcome.folder / point.name), "settings": point.settings, "state": state, "failure": reason}
