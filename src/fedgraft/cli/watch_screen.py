"""How a watched run or sweep looks in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedgraft.report.watching import View

BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", "_.-~=+*#"
STYLES = {"running": "bold green", "finished": "bold green", "waiting": "dim", "failed": "bold red", "killed": "bold red"}
WORDS = {
    "stopped": "stopped",
    "failed": "failed",
    "killed": "its process is gone",
    "unknown": "it is not known whether it goes on",
}
SPARKS = 30  # characters of a curve
BESIDES = 11  # lines of a frame that are not a client's
LEAST_CLIENTS = 3


def draw(views: View | list[View], terminal: Any) -> Any:
    """A frame for this terminal."""
    plain = terminal.options.ascii_only
    room = terminal.height if terminal.is_terminal else 10**6
    return _sweep(views, plain, room) if isinstance(views, list) else _run(views, plain, room)


def waiting(folder: Path) -> Any:
    """The frame before there is anything."""
    from rich.text import Text

    return Text(f"waiting for {folder}: nothing there yet (a run makes its folder once the model is loaded); Ctrl-C ends this", style="dim")


def sparkline(values: Sequence[float], width: int = SPARKS, plain: bool = False) -> str:
    """Values as a curve of block characters, between their own least and largest; more than fit are averaged in groups."""
    levels = PLAIN if plain else BLOCKS
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite:
        return ""
    bounds = [round(at * len(finite) / min(width, len(finite))) for at in range(min(width, len(finite)) + 1)]
    groups = [finite[low:high] for low, high in pairwise(bounds)]
    means = [sum(group) / len(group) for group in groups]
    low, span = min(means), max(means) - min(means)
    return "".join(levels[round((value - low) / span * (len(levels) - 1)) if span else 0] for value in means)


def _run(view: View, plain: bool, room: int) -> Any:
    from rich.console import Group
    from rich.text import Text

    from fedgraft.report.record import resume_command
    from fedgraft.words import duration, size

    title = Text.assemble((view.method, "bold"), "  ", (str(view.folder), ""), "  ", (view.state, STYLES.get(view.state, "bold yellow")))
    rows = [("rounds", f"{_bar(view.done, view.planned, plain)} {view.done}/{view.planned}")]
    if view.left is not None:
        rows.append(("left", f"about {duration(view.left)} of training" if view.done < view.planned else "evaluation"))
    if view.now:
        rows.append(("now", view.now))
    if view.bytes_up or view.bytes_down:
        rows.append(("traffic", f"{size(view.bytes_up)} up, {size(view.bytes_down)} down so far (all clients)"))
    rows += [("result", f"{figure}: {_models(values)}") for figure, values in view.results.items() if figure]
    if view.state in WORDS:
        why = f": {view.reason}" if view.reason else ""
        rows.append(("", f"{WORDS[view.state]}{why}; continue with: {resume_command(view.folder)}"))
    parts = [title, *(Text.assemble((f"{label:<10} ", "bold"), text) for label, text in rows)]
    return Group(*parts, *([_losses(view, plain, room)] if view.mean else []))


def _losses(view: View, plain: bool, room: int) -> Any:
    """A curve per client, as many as there is room for."""
    from rich.table import Table
    from rich.text import Text

    table = Table("client", "training loss by round", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("first", "last"):
        table.add_column(heading, justify="right")
    shown = list(view.losses.items())
    most = max(LEAST_CLIENTS, room - BESIDES - len(view.results))
    for name, values in [("mean", view.mean), *shown[:most]]:
        cells = (Text(name), sparkline(values, plain=plain), f"{values[0]:.3f}", f"{values[-1]:.3f}")
        table.add_row(*cells, style="bold" if name == "mean" else None)
    if len(shown) > most:
        table.add_row(Text(f"and {len(shown) - most} more", style="dim"), "", "", "")
    return table


def _sweep(views: Sequence[View], plain: bool, room: int) -> Any:
    """A line per run: those that are at work or in trouble first, if not all fit."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from fedgraft.words import duration

    done = sum(view.state == "finished" for view in views)
    table = Table("run", "state", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("rounds", "left", "loss"):
        table.add_column(heading, justify="right")
    table.add_column("curve, or what happened")
    most = max(LEAST_CLIENTS, room - 5)
    urgent = sorted(views, key=lambda view: ("running", "failed", "killed", "stopped", "unknown", "finished", "waiting").index(view.state))
    shown = set(map(id, urgent[:most]))
    for view in (view for view in views if id(view) in shown):
        left = "" if view.left is None else duration(view.left)
        loss = f"{view.mean[-1]:.3f}" if view.mean else ""
        told = Text(view.reason, style="red") if view.reason else Text(sparkline(view.mean, 20, plain))
        state = Text(view.state, style=STYLES.get(view.state, "bold yellow"))
        table.add_row(Text(view.folder.name), state, f"{view.done}/{view.planned or '?'}", left, loss, told)
    rest = [Text(f"and {len(views) - most} more", style="dim")] if len(views) > most else []
    return Group(Text(f"{_bar(done, len(views), plain)} {done} of {len(views)} runs finished", style="bold"), table, *rest)


def _bar(done: int, total: int, plain: bool, width: int = 20) -> str:
    full = round(width * min(1.0, done / max(1, total)))
    return ("#" if plain else "█") * full + ("." if plain else "░") * (width - full)


def _models(values: dict[str, float]) -> str:
    return ", ".join(f"{model} {value:.3f}" for model, value in values.items())
