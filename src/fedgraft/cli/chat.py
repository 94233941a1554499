"""`fedgraft chat`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgraft.cli.frame import app, console, escape, starting
from fedgraft.cli.using import BaseKeys, NewTokens, RunFolder, Seed, Temperature, TopP, telling, wanted

if TYPE_CHECKING:
    from fedgraft.use.loaded import Loaded
    from fedgraft.use.writing import Conversation, Sampling

HELP = "/use NAME ... other models, /models all names, /forget begin anew, /quit (or Ctrl-D) end; Ctrl-C stops an answer"


@app.command()
def chat(
    run: RunFolder,
    client: Annotated[
        list[str] | None, typer.Option("--client", help="Whose model: a client, shared or base. Several: side by side.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Beside the base and the shared model.")] = False,
    system: Annotated[str, typer.Option("--system", help="A system message to begin with.")] = "",
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    set_: BaseKeys = None,
) -> None:
    """Talk with a client's model, or with several side by side; each remembers what it was told and what it answered.

    Lines come from the terminal, or from standard input where that is none.
    """
    terminal = console()
    with starting(False):
        from fedgraft.use.load import load
        from fedgraft.use.writing import Sampling

        with telling(_warn):
            loaded = load(run, overrides=set_ or [])
    names = wanted(loaded, client)
    if compare:
        names = list(dict.fromkeys([*(name for name in ("base", "shared") if name in loaded.models), *names]))
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    loaded.room(max_new_tokens)
    if sys.stdin.isatty():
        terminal.print(f"{', '.join(names)}; {HELP}", style="dim", markup=False, highlight=False)
    _talk(_Table(loaded, names, system), sampling, terminal)


class _Table:
    """Who is talked with."""

    def __init__(self, loaded: Loaded, names: list[str], system: str) -> None:
        self.loaded, self.system = loaded, system
        self.talks: list[Conversation] = []
        self.invite(names)

    def invite(self, names: list[str]) -> None:
        """Talk with these from here on, anew.

        Raises:
            ValueError: there is no such model.
        """
        from fedgraft.use.writing import Conversation

        self.talks = [Conversation(self.loaded, name, self.system) for name in wanted(self.loaded, names)]


def _talk(table: _Table, sampling: Sampling, terminal: Any) -> None:
    """Read lines until there are no more."""
    asks = sys.stdin.isatty()
    while True:
        try:
            line = terminal.input("[bold cyan]>[/] ") if asks else _next_line()
        except (EOFError, KeyboardInterrupt):
            return
        words = line.split()
        if not words:
            continue
        if words[0] in {"/quit", "/exit"}:
            return
        try:
            if words[0].startswith("/"):
                COMMANDS.get(words[0], _help)(table, words[1:], terminal)
            else:
                _answer(table.talks, line.strip(), sampling, terminal)
        except ValueError as error:
            if not asks:
                raise
            _warn(str(error))
        except KeyboardInterrupt:
            terminal.print()


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _answer(talks: list[Conversation], text: str, sampling: Sampling, terminal: Any) -> None:
    if len(talks) > 1 and terminal.is_terminal:
        _beside(talks, text, sampling, terminal)
        return
    for talk in talks:
        if len(talks) > 1:
            terminal.print(f"[bold]{escape(talk.client)}[/]")
        talk.say(text, sampling, lambda piece: terminal.print(piece, end="", markup=False, highlight=False, soft_wrap=True))
        terminal.print()


def _beside(talks: list[Conversation], text: str, sampling: Sampling, terminal: Any) -> None:
    """A column for each, which fill one after another."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    columns = [Text() for _ in talks]

    def drawn() -> Table:
        table = Table(*(talk.client for talk in talks), expand=True, box=None, padding=(0, 2, 1, 0), header_style="bold")
        for column in table.columns:
            column.ratio, column.overflow = 1, "fold"
        table.add_row(*columns)
        return table

    with Live(drawn(), console=terminal, refresh_per_second=12, vertical_overflow="visible") as live:
        for talk, column in zip(talks, columns, strict=True):

            def hear(piece: str, column: Text = column) -> None:
                column.append(piece)
                live.update(drawn())

            talk.say(text, sampling, hear)


def _use(table: _Table, names: list[str], terminal: Any) -> None:
    table.invite(names)
    terminal.print(f"now with {', '.join(names)}", style="dim", markup=False, highlight=False)


def _forget(table: _Table, names: list[str], terminal: Any) -> None:
    for talk in table.talks:
        talk.forget()
    terminal.print("forgotten", style="dim")


def _models(table: _Table, names: list[str], terminal: Any) -> None:
    terminal.print(", ".join(table.loaded.models), markup=False, highlight=False, soft_wrap=True)


def _help(table: _Table, names: list[str], terminal: Any) -> None:
    terminal.print(HELP, style="dim", markup=False, highlight=False, soft_wrap=True)


def _warn(text: str) -> None:
    console(stderr=True).print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)


COMMANDS: dict[str, Callable[[_Table, list[str], Any], None]] = {"/use": _use, "/forget": _forget, "/models": _models}
