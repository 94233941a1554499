"""One model of a run into a folder, in one of several formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fedgraft import files, plugins
from fedgraft.use.export import merged, package, peft_adapter
from fedgraft.use.export.card import write_card
from fedgraft.use.export.subject import Subject, Written
from fedgraft.use.load import load
from fedgraft.use.source import BASE

FORMATS: dict[str, Callable[[Subject, Path], Written]] = {
    "peft": peft_adapter.write,
    "fedgraft": package.write,
    "merged": merged.write,
}


def export(folder: str | Path, client: str, kind: str, out: str | Path, *, overrides: Sequence[str] = ()) -> Written:
    """Write a model and its card into a new folder, which is there whole or not at all.

    Args:
        folder: a run folder, or an export in fedgraft's own format.
        client: the model: a client, or `shared`.
        kind: a name in `FORMATS`.
        out: the new folder.
        overrides: as `load`.

    Raises:
        ValueError: as `load`; an unknown format, an occupied folder, or a model that the format cannot hold exactly, with the reason.
    """
    if kind not in FORMATS:
        raise ValueError(f"--as {kind}: there is no such format{plugins.nearest(kind, list(FORMATS))}; choose from {', '.join(FORMATS)}")
    if client == BASE:
        raise ValueError("--client base: the base is there already, with nothing of this run in it; choose a client or shared")
    with files.whole_folder(Path(out)) as aside:
        subject = Subject(load(folder, client, overrides=overrides), client)
        written = FORMATS[kind](subject, aside)
        write_card(subject, written, aside)
    return written
