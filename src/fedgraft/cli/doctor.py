"""`fedgraft doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from fedgraft.cli.frame import AsJson, app, print_json, starting


@app.command()
def doctor(
    target: Annotated[
        str | None,
        typer.Argument(
            help="A recipe (YAML file or shipped name) or a model (hub name, folder, config.json); without one, this machine alone."
        ),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: section.key=value. Repeatable.")] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens a row; without it data.max_length.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Rows a step; without it training.batch_size.")] = None,
    as_json: AsJson = False,
) -> None:
    """Look at this machine, a recipe or a model: what would train, travel and stay, what it costs, and what stands in the way.

    TARGET is a recipe (YAML file or shipped name) or a model (hub name, folder, or config.json alone). Exit code 2 when a run would fail.
    """
    given = {"data.max_length": length, "training.batch_size": batch}
    overrides = [*(set_ or []), *(f"{key}={value}" for key, value in given.items() if value is not None)]
    with starting(as_json):
        from fedgraft.checkup import check_up

        found = check_up(target, overrides)
    if as_json:
        print_json(found.as_dict())
    else:
        from fedgraft.cli.screen import print_checkup

        print_checkup(found)
    if found.failing:
        raise typer.Exit(2)
