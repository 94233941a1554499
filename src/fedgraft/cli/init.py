"""`fedgraft init`."""

from __future__ import annotations

import shlex
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgraft.cli.frame import AsJson, app, console, print_json, starting

if TYPE_CHECKING:
    from fedgraft.data.survey import Lengths
    from fedgraft.starter.suggest import Start


@app.command()
def init(
    path: Annotated[str, typer.Argument(help="A JSONL file, or a folder with one file or subfolder per client.")],
    out: Annotated[Path, typer.Option("--out", help="The recipe to write; never overwritten.")] = Path("recipe.yaml"),
    model: Annotated[
        str, typer.Option("--model", help="demo, a local folder or a hub name; of a hub name the tokenizer is fetched.")
    ] = "demo",
    method: Annotated[str, typer.Option("--method", help="A federated method; see: fedgraft list methods")] = "flex",
    clients: Annotated[int | None, typer.Option("--clients", min=1, help="Divide one file among so many clients.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the rows, write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check your own rows and write a commented recipe for them."""
    if out.exists() and not check:
        raise ValueError(f"{out}: exists and is never overwritten; choose another --out, or only check the rows with --check")
    with starting(as_json):
        from fedgraft import files
        from fedgraft.starter.suggest import suggest
        from fedgraft.starter.text import commented

        start = suggest(path, model=model, method=method, clients=clients)
    if not check:
        rows = sum(sum(client.rows.values()) for client in start.survey.clients.values())
        heading = f"A recipe for {path}: {len(start.survey.clients)} clients, {rows} rows. Keys behind # show their defaults."
        files.write_text(out, commented(start.values, start.notes, heading))
    if as_json:
        found = start.survey.as_dict()
        print_json(
            {"recipe": None if check else str(out), "values": start.values, "notes": start.notes, "tokenizer": start.tokenizer, **found}
        )
        return
    _show(start)
    if not check:
        next_step = f"fedgraft run {shlex.quote(str(out))}"
        console().print(f"Wrote {out}; read it, then: {next_step}", markup=False, highlight=False, soft_wrap=True)


def _show(start: Start) -> None:
    """Rows and lengths per client, classes, what was decided, and the problems with their remedies."""
    from rich.table import Table as RichTable

    seen = start.survey
    lengths = RichTable("client", title=f"rows, and tokens of {start.tokenizer}: median / 95 % / longest", title_justify="left")
    for name in ("train", "validation", "test", "prompt", "response", "cut"):
        lengths.add_column(name, justify="right")
    for name, client in seen.clients.items():
        spreads = [_spread(client.prompt), _spread(client.response)]
        lengths.add_row(name, *(str(client.rows[split]) for split in ("train", "validation", "test")), *spreads, str(client.cut))
    console().print(lengths)
    _show_counts("labels", {name: client.labels for name, client in seen.clients.items()})
    _show_counts("categories", {name: client.categories for name, client in seen.clients.items()})
    cut = sum(client.cut for client in seen.clients.values())
    lines = [f"data.max_length {seen.max_length}: cuts {cut} rows (the default, 512: {start.cut_by_default})"]
    lines += [f"data.partition {start.values['data']['partition']}: {start.notes['data.partition']}"]
    for remedy, problems in groupby(seen.problems, key=lambda problem: problem.remedy):
        lines += [f"! client {found.client}: {found.problem}" if found.client else f"! {found.problem}" for found in problems]
        lines.append(f"  -> {remedy}")
    number = len(seen.problems)
    lines.append(f"{number} thing{'' if number == 1 else 's'} to look at" if number else "no problem found")
    console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _show_counts(what: str, per_client: dict[str, dict[str, int]]) -> None:
    """`bakery  yes 12, no 8` for every client, where one has more than one kind."""
    if max(map(len, per_client.values())) < 2:
        return
    console().print(f"{what}, rows of each:", markup=False, highlight=False, soft_wrap=True)
    width = max(map(len, per_client))
    for name, counts in per_client.items():
        told = ", ".join(f"{kind} {number}" for kind, number in counts.items())
        console().print(f"  {name:<{width}}  {told}", markup=False, highlight=False, soft_wrap=True)


def _spread(lengths: Lengths) -> str:
    return f"{lengths.median} / {lengths.p95} / {lengths.longest}"
