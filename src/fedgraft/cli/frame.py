"""The typer application that every command registers with, and what all commands share: console, progress, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgraft import __version__

if TYPE_CHECKING:
    from fedgraft.report.progress import Progress

app = typer.Typer(
    name="fedgraft",
    help="Personalise pretrained Mixture-of-Experts language models by federated learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output and nothing else.")]
IsQuiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
IsVerbose = Annotated[bool, typer.Option("--verbose", "-v", help="One line of progress per client and round.")]
STATE = {"debug": False}


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
    STATE["debug"] = debug


@contextmanager
def reporting(quiet: bool, verbose: bool = False, folder: Path | None = None, again: str = "") -> Iterator[Progress]:
    """Progress that leaves the terminal as it was.

    Ctrl-C ends in exit code 130, SIGTERM in 143, both with how to go on (`folder`: the run that was there; `again`: the command, where it
    is another than `resume`).
    """
    from fedgraft.signals import Terminated, terminating

    progress = make_progress(quiet, verbose)
    try:
        with terminating():
            yield progress
    except KeyboardInterrupt as stop:
        progress.close()
        _say_stopped(getattr(stop, "folder", folder), again)
        terminated = isinstance(stop, Terminated) or isinstance(stop.__cause__, Terminated)
        raise typer.Exit(143 if terminated else 130) from None
    finally:
        progress.close()


def _say_stopped(folder: Path | None, again: str) -> None:
    hint = "Nothing was begun."
    if folder is not None or again:
        from fedgraft.report.record import resume_command

        hint = f"What was finished is saved; continue with: {again or resume_command(folder or Path())}"
    console(stderr=True).print(f"Stopped. {hint}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def starting(quiet: bool) -> AbstractContextManager[object]:
    """A sign of life in a terminal while the heavy modules are imported."""
    terminal = console(stderr=True)
    return terminal.status("starting") if terminal.is_terminal and not quiet else nullcontext()


def make_progress(quiet: bool, verbose: bool) -> Progress:
    """Bars in a terminal, lines elsewhere, nothing when quiet."""
    from fedgraft.report.progress import Bars, Lines, Quiet

    if quiet:
        return Quiet()
    terminal = console(stderr=True)
    if terminal.is_terminal:
        return Bars(terminal, verbose)
    return Lines(lambda line: print(line, file=sys.stderr, flush=True), verbose=verbose)


def print_json(value: Any) -> None:
    """One indented document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def console(stderr: bool = False) -> Any:
    """A rich console."""
    from rich.console import Console

    return Console(stderr=stderr)


def escape(text: str) -> str:
    """The text with rich's markup taken literally."""
    from rich import markup

    return markup.escape(text)
