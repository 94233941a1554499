"""`fedgraft forget`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgraft.cli.frame import AsJson, app, console, print_json, starting

if TYPE_CHECKING:
    from fedgraft.forgetting.forget import Forgotten


@app.command()
def forget(
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    client: Annotated[str, typer.Option("--client", help="Who is to be forgotten.")],
    out: Annotated[Path | None, typer.Option("--out", help="New folder for the run without it (default: RUN-without-NAME).")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Also delete from RUN what is known of it. This can't be undone.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge a run again without one client where its replies were kept, and say what else is known of it."""
    with starting(as_json):
        from fedgraft.forgetting.forget import forget as execute

    done = execute(folder, client, out=out, delete=delete)
    if as_json:
        print_json({**vars(done), "run": str(done.run), "redone": str(done.redone) if done.redone else None})
        return
    console().print("\n".join(_lines(done)), markup=False, highlight=False, soft_wrap=True)


def _lines(done: Forgotten) -> list[str]:
    if done.redone is not None:
        lines = [f"{done.redone}: the run merged again without {done.client}, from the replies kept of the others"]
        lines += [*done.notes, f"Continue and evaluate it with: fedgraft resume {done.redone} (in process once its rows are gone)"]
    elif done.why_not:
        lines = [f"The merges can't be done again: {done.why_not}.", f"Exact is a new run without the rows of {done.client}."]
    else:
        lines = [f"{done.client} is in the merge of no round: the merged leaves hold nothing of it."]
    if done.deleted:
        lines.append(f"Deleted from {done.run}: {', '.join(done.holds)}")
    else:
        lines.append(f"{done.run} is as it was; --delete would delete there: {', '.join(done.holds)}")
    return [*lines, *(f"Still there: {what}" for what in done.remains)]
