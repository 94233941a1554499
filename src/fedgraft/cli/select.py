"""`fedgraft select`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedgraft.cli.frame import AsJson, IsQuiet, IsVerbose, app, console, print_json, reporting, starting


@app.command()
def select(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file or the name of a shipped recipe; without one, the embedded demo.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="New file for the choices.")] = Path("choices.json"),
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: section.key=value. Repeatable.")] = None,
    as_json: AsJson = False,
    quiet: IsQuiet = False,
    verbose: IsVerbose = False,
) -> None:
    """Choose every client's experts before a run, with one decoder layer of the base in memory at a time.

    For a base larger than memory: the run, which reads the file (selection.file), can have it quantised, offloaded or on another machine.
    """
    with reporting(quiet or as_json, verbose) as progress:
        with starting(quiet or as_json):
            from fedgraft.beforehand import choose_beforehand
        found = choose_beforehand(recipe, out=out, overrides=set_, progress=progress)
    tokens = sorted(choice.tokens for choice in found.choices.values())
    if as_json:
        clients = {name: {"experts": choice.experts, "tokens": choice.tokens} for name, choice in found.choices.items()}
        print_json({"file": str(found.path), "layers": found.layers, "clients": clients})
        return
    span = f"{tokens[0]:,}" if tokens[0] == tokens[-1] else f"{tokens[0]:,} to {tokens[-1]:,}"
    lines = [
        f"{len(found.choices)} clients chose in {found.layers} layers by {span} tokens each: {found.path}",
        f"a run takes these with --set selection.file={found.path}",
    ]
    console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
