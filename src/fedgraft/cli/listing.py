"""`fedgraft list`."""

from __future__ import annotations

from typing import Annotated

import typer

from fedgraft.cli.frame import AsJson, app, console, print_json

KINDS = {"methods": "method", "families": "family", "criteria": "criterion", "datasets": "dataset", "recorders": "recorder"}


@app.command(name="list")
def list_(
    kind: Annotated[str, typer.Argument(help="methods, families, datasets, criteria, recorders or recipes")],
    as_json: AsJson = False,
) -> None:
    """List what a name in a recipe can be."""
    from fedgraft.plugins import nearest

    lists = [*KINDS, "recipes"]
    if kind not in lists:
        raise ValueError(f"list {kind}: there is no such list{nearest(kind, lists)}; choose from {', '.join(lists)}")
    if kind == "families":
        from fedgraft.moe.catalogue import families

        rows = families()
    elif kind == "recipes":
        from fedgraft.recipe import about, shipped_names

        rows = [{"name": name, "supported": True, "reason": about(name)} for name in shipped_names()]
    else:
        from fedgraft.plugins import describe

        rows = describe(KINDS[kind])
    if as_json:
        print_json(rows)
        return
    from rich.table import Table as RichTable

    all_alike = all(row["supported"] for row in rows)
    table = RichTable("name", *([] if all_alike else ["supported"]), "note")
    for row in rows:
        table.add_row(row["name"], *([] if all_alike else ["yes" if row["supported"] else "no"]), row["reason"])
    console().print(table)
