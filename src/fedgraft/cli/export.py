"""`fedgraft export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedgraft.cli.frame import AsJson, IsQuiet, app, console, print_json, reporting, starting
from fedgraft.cli.using import BaseKeys, RunFolder, telling


@app.command()
def export(
    run: RunFolder,
    kind: Annotated[
        str,
        typer.Option("--as", help="peft: a LoRA adapter; fedgraft: all leaves, for fedgraft.load; merged: one transformers checkpoint."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The new folder; never overwritten.")],
    client: Annotated[str, typer.Option("--client", help="Whose model: a client, or shared for what was aggregated.")] = "shared",
    set_: BaseKeys = None,
    as_json: AsJson = False,
    quiet: IsQuiet = False,
) -> None:
    """Write a model of a run for other tools, with a model card; refused where it could not be exactly that model."""
    with reporting(quiet or as_json) as progress:
        with starting(quiet or as_json):
            from fedgraft.use.export.export import export as execute
        progress.begin("exporting", 1)
        with telling(progress.warn):
            written = execute(run, client, kind, out, overrides=set_ or [])
        progress.step(f"{client} as {kind}")
    if as_json:
        print_json({"folder": str(out), **vars(written)})
        return
    lines = [f"{out}: {written.kind}, card in README.md"]
    if written.difference is not None:
        lines.append(f"loaded again and compared: no logit differs by more than {written.difference:.2g}")
    lines += [*written.notes, "load it with:", written.loading.replace("FOLDER", repr(str(out)))]
    console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
