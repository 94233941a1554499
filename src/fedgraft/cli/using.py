"""What the commands that use a trained model share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedgraft.use.loaded import Loaded

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or one that fedgraft export --as fedgraft wrote.")]
BaseKeys = Annotated[
    list[str] | None, typer.Option("--set", help="Load the base another way: model.key=value, such as model.name=FOLDER. Repeatable.")
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0, help="0 takes the likeliest token, more draws more freely.")]
TopP = Annotated[float, typer.Option("--top-p", min=0, max=1, help="Draw from the likeliest tokens that make up this probability.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the drawing; with temperature 0 of no effect.")]


@contextmanager
def telling(warn: Callable[[str], object]) -> Iterator[None]:
    """What fedgraft warns of inside the block, through `warn`."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        yield
    for one in heard:
        if one.category is UserWarning:
            warn(str(one.message))


def wanted(loaded: Loaded, clients: Sequence[str] | None, all_clients: bool = False) -> list[str]:
    """The models that were asked for, each once.

    Raises:
        ValueError: none was, or one of a name that there is not; names those there are.
    """
    from fedgraft.use.source import check_name

    alone = [loaded.source.first] if len(loaded.source.clients) == 1 and loaded.source.first != "base" else []
    chosen = list(dict.fromkeys([*(clients or []), *(loaded.source.clients if all_clients else [])])) or alone
    if not chosen:
        raise ValueError(f"--client: whose model? There are: {', '.join(loaded.models)}")
    for name in chosen:
        check_name(loaded.source, name)
    return chosen
