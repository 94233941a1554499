"""`fedgraft join` and `fedgraft import`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgraft.cli.frame import AsJson, IsQuiet, IsVerbose, app, console, print_json, reporting, starting

if TYPE_CHECKING:
    from fedgraft.joining.join import Line

ALL = "all"


@app.command()
def join(
    federation: Annotated[
        Path, typer.Argument(metavar="RUN", help="A finished run, or its shared leaves as export --as fedgraft wrote them.")
    ],
    data: Annotated[Path, typer.Option("--data", help="The new site's rows: a .jsonl file, or a folder of them.")],
    out: Annotated[Path | None, typer.Option("--out", help="New folder (default: runs/join-<name>-<time>).")] = None,
    rows: Annotated[str, typer.Option("--rows", help="Numbers of training rows to try; all is always among them.")] = "10,30,100,all",
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Optimiser steps for each of them (default: three passes over its rows).")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The new client's name (default: the file's).")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: section.key=value. Repeatable.")] = None,
    as_json: AsJson = False,
    quiet: IsQuiet = False,
    verbose: IsVerbose = False,
) -> None:
    """Join a finished federation as a new site: graft on its shared leaves, and see from how many rows on that pays."""
    wanted = _numbers(rows)
    with reporting(quiet or as_json, verbose) as progress:
        with starting(quiet or as_json):
            from fedgraft.joining.join import join as execute
            from fedgraft.joining.join import lines_of, verdict
        record = execute(federation, data, name=name, out=out, rows=wanted, steps=steps, overrides=set_ or [], progress=progress)
    lines = lines_of(record)
    (client,) = record.results
    if as_json:
        print_json({"folder": str(record.folder), "client": client, "lines": [vars(line) for line in lines], "verdict": verdict(lines)})
        return
    _show(client, lines)
    say = [verdict(lines), f"Its model: fedgraft chat {shlex.quote(str(record.folder))} --client {shlex.quote(client)}"]
    console().print("\n".join(say), markup=False, highlight=False, soft_wrap=True)


def _numbers(rows: str) -> list[int]:
    """`10,30,all` as numbers; all is tried anyway.

    Raises:
        ValueError: something else is among them.
    """
    words = [word.strip() for word in rows.split(",") if word.strip() not in {"", ALL}]
    if wrong := [word for word in words if not word.isdecimal() or not int(word)]:
        raise ValueError(f"--rows: {wrong[0]!r} is no number of rows; write for example 10,30,100,all")
    return [int(word) for word in words]


def _show(client: str, lines: Sequence[Line]) -> None:
    from rich.table import Table as RichTable

    drawn = RichTable("training rows", title=f"{client}: response loss (nats/token) on its test rows", title_justify="left")
    for heading in ("base", "shared", "its own", "below shared", "95 % interval"):
        drawn.add_column(heading, justify="right")
    for line in lines:
        losses = [f"{loss:.3f}" for loss in (line.base, line.shared, line.personal)]
        between = "too few rows" if line.interval is None else f"{line.interval[0]:.3f} to {line.interval[1]:.3f}"
        drawn.add_row(str(line.rows), *losses, f"{line.gain:+.3f}", between)
    console().print(drawn)


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(help="A PEFT adapter, what export --as fedgraft wrote, or a run folder, whose shared leaves are taken.")
    ],
    data: Annotated[
        str | None, typer.Option("--data", help="The rows to go on with, as for init; of a run they may be its own, without this.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The recipe to write; never overwritten.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option("--model", help="The base, where SOURCE does not name it or it lies elsewhere now.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="How to go on (default: as the run did, else flex).")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a recipe that goes on from leaves which are there already."""
    if out.exists():
        raise ValueError(f"{out}: exists and is never overwritten; choose another --out")
    with starting(as_json):
        from fedgraft import files
        from fedgraft.joining.importing import continuing, in_yaml

        values, notes = continuing(source, data=data, model=model, method=method)
    files.write_text(out, in_yaml(values, notes, f"A recipe that goes on from {source}. Keys behind # show their defaults."))
    if as_json:
        print_json({"recipe": str(out), "values": values, "notes": notes})
        return
    lora = ", ".join(f"{key} {values['lora'][key]}" for key in ("rank", "alpha", "targets"))
    lines = [f"base {values['model']['name']}, method {values['method']['name']}, lora: {lora}"]
    lines.append(f"Wrote {out}; read it, then: fedgraft run {shlex.quote(str(out))}")
    console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
