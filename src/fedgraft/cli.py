"""The command line. Heavy modules are imported inside the commands, so `--help` answers at once."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgraft import __version__

if TYPE_CHECKING:
    from fedgraft.report.progress import Progress
    from fedgraft.report.record import Record
    from fedgraft.report.table import Table

app = typer.Typer(
    name="fedgraft",
    help="Personalise pretrained Mixture-of-Experts language models by federated learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")]
IsQuiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
KINDS = {"methods": "method", "families": "family", "criteria": "criterion", "datasets": "dataset"}


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedgraft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Options of every command."""
    _state["debug"] = debug


_state = {"debug": False}


@app.command()
def run(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file or the name of a shipped recipe; without one, the embedded demo.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="New folder for the run [default: runs/<method>-<time>].")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: section.key=value. Repeatable.")] = None,
    as_json: AsJson = False,
    quiet: IsQuiet = False,
) -> None:
    """Run a recipe and print its tables."""
    with _starting(quiet or as_json):
        from fedgraft.runner import run as execute

    with _reporting(quiet or as_json) as progress:
        record = execute(recipe, out=out, overrides=set_, progress=progress)
    _show_run(record, as_json)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    rounds: Annotated[int | None, typer.Option("--rounds", help="Extend the run to so many rounds.")] = None,
    as_json: AsJson = False,
    quiet: IsQuiet = False,
) -> None:
    """Continue a run that was stopped, or extend a finished one."""
    with _starting(quiet or as_json):
        from fedgraft.runner import resume as execute

    with _reporting(quiet or as_json, folder) as progress:
        record = execute(folder, rounds=rounds, progress=progress)
    _show_run(record, as_json)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.")],
    as_json: AsJson = False,
) -> None:
    """Compare runs: clients x methods, one table per figure."""
    from fedgraft.report.record import Record
    from fedgraft.report.table import compare_tables, cost, labels

    records = [Record.load(folder) for folder in folders]
    for record in records:
        if not record.results:
            raise ValueError(f"{record.folder}: not evaluated yet; finish it with: fedgraft resume {record.folder}")
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
        _print_json({"runs": runs, "tables": [table.as_dict() for table in tables]})
        return
    _print_tables(tables)
    for name, record in zip(names, records, strict=True):
        _print_cost(name, record)


@app.command(name="list")
def list_(
    kind: Annotated[str, typer.Argument(help="methods, families, datasets or criteria")],
    as_json: AsJson = False,
) -> None:
    """List what a name in a recipe can be."""
    from fedgraft.plugins import nearest

    if kind not in KINDS:
        raise ValueError(f"list {kind}: there is no such list{nearest(kind, list(KINDS))}; choose from {', '.join(KINDS)}")
    if kind == "families":
        from fedgraft.moe.catalogue import families

        rows = families()
    else:
        from fedgraft.plugins import describe

        rows = describe(KINDS[kind])
    if as_json:
        _print_json(rows)
        return
    from rich.table import Table as RichTable

    table = RichTable("name", "supported", "note")
    for row in rows:
        table.add_row(row["name"], "yes" if row["supported"] else "not proven", row["reason"])
    _console().print(table)


def main() -> None:
    """Entry point: errors a user can mend end in one message and exit code 2, Ctrl-C in 130 and how to go on."""
    try:
        code = app(standalone_mode=False)
    except (ValueError, OSError) as error:
        if _state["debug"]:
            raise
        _console(stderr=True).print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error of the command line library
        if show is None:
            raise
        show()
        raise SystemExit(getattr(error, "exit_code", 2)) from None
    if code:
        raise SystemExit(code)


@contextmanager
def _reporting(quiet: bool, folder: Path | None = None) -> Iterator[Progress]:
    """Progress that leaves the terminal as it was; Ctrl-C ends in exit code 130 and how to go on (`folder`: the run that was there)."""
    progress = _progress(quiet)
    try:
        yield progress
    except KeyboardInterrupt as stop:
        progress.close()
        left = getattr(stop, "folder", folder)
        hint = f"What was finished is saved; continue with: fedgraft resume {shlex.quote(str(left))}" if left else "Nothing was begun."
        _console(stderr=True).print(f"Stopped. {hint}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        progress.close()


def _show_run(record: Record, as_json: bool) -> None:
    from fedgraft.report.table import cost, run_tables

    tables = run_tables(record)
    if as_json:
        _print_json(
            {
                "folder": str(record.folder),
                "method": record.method,
                "digest": record.digest,
                **cost(record),
                "tables": [table.as_dict() for table in tables],
            }
        )
        return
    _print_tables(tables)
    _print_cost(record.method, record)


def _print_tables(tables: list[Table]) -> None:
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
        _console().print(table.title, style="bold", highlight=False, soft_wrap=True)
        _console().print(drawn)


def _print_cost(name: str, record: Record) -> None:
    from fedgraft.report.table import cost

    figures = cost(record)
    up, down = figures["bytes_up_per_round"] / 1e6, figures["bytes_down_per_round"] / 1e6
    line = f"{name}: {figures['rounds']} round{'' if figures['rounds'] == 1 else 's'} in {figures['training_seconds']:.0f} s, "
    line += f"{up:.2f} MB up and {down:.2f} MB down a round (fp32, all clients)"
    _console().print(f"{line}\n  results in {record.folder}", highlight=False, soft_wrap=True)


def _starting(quiet: bool) -> AbstractContextManager[object]:
    """A sign of life in a terminal while the heavy modules are imported."""
    console = _console(stderr=True)
    return console.status("starting") if console.is_terminal and not quiet else nullcontext()


def _progress(quiet: bool) -> Progress:
    from fedgraft.report.progress import Bars, Lines, Quiet

    if quiet:
        return Quiet()
    console = _console(stderr=True)
    return Bars(console) if console.is_terminal else Lines(lambda line: print(line, file=sys.stderr, flush=True))


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
