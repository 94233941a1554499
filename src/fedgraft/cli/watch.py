"""`fedgraft watch`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fedgraft.cli.frame import app, console


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="A run or sweep folder, which need not be there yet.")],
    once: Annotated[bool, typer.Option("--once", help="Print how it stands and end; always so where the output is no terminal.")] = False,
    every: Annotated[float, typer.Option("--every", help="Seconds between looks.", min=0.1)] = 1.0,
) -> None:
    """Show how a run or a sweep is getting on, from another terminal; it is only read.

    Ends when all is finished. A run that stopped is waited for, so that a resume is seen; a folder that is not there is waited for as well,
    but with --once an error.
    """
    from fedgraft.cli.watch_screen import draw
    from fedgraft.report.watching import find

    terminal = console()
    if once or not terminal.is_terminal:
        watched = find(folder)
        if watched is None:
            raise ValueError(f"{folder}: nothing there yet; without --once, in a terminal, fedgraft watch waits for it")
        terminal.print(draw(watched.look(), terminal), soft_wrap=True)
        return
    try:
        _follow(folder, every)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _follow(folder: Path, every: float) -> None:
    """Draw until all is finished."""
    from rich.live import Live

    from fedgraft.cli.watch_screen import draw, waiting
    from fedgraft.report.watching import find

    terminal, watched = console(), None
    with Live(waiting(folder), console=terminal, auto_refresh=False) as live:
        while True:
            watched = watched or find(folder)
            if watched is not None:
                views = watched.look()
                live.update(draw(views, terminal), refresh=True)
                if all(view.state == "finished" for view in (views if isinstance(views, list) else [views])):
                    return
            else:
                live.update(waiting(folder), refresh=True)
            time.sleep(every)
