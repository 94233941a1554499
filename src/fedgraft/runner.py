"""Running a recipe into a folder and resuming it there. One process at a time holds the folder."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from fedgraft import files, folders, origin
from fedgraft.reach import Connect
from fedgraft.recipe import Recipe, load_recipe
from fedgraft.report.progress import Progress, Quiet
from fedgraft.report.record import Record, read_recipe, write_document, write_recipe
from fedgraft.session import Session
from fedgraft.trouble import Stand, told


def run(
    recipe: str | Path | dict[str, Any] | Recipe | None = None,
    *,
    out: str | Path | None = None,
    overrides: list[str] | None = None,
    progress: Progress | None = None,
    connect: Connect | None = None,
) -> Record:
    """Run a recipe into a new folder.

    Args:
        recipe: YAML file, name of a shipped recipe, dict or `Recipe`; None is the embedded demo.
        out: the run folder, which must not exist or be empty; None makes one under `runs/`.
        overrides: `section.key=value` assignments.
        progress: where to report; None says nothing.
        connect: how clients are reached; None: as the recipe's `engine` says.

    Raises:
        ValueError: bad recipe, data or model, or a machine that lacks memory, space or permission; the message names file, key or client
            and the remedy.
    """
    checked = load_recipe(recipe, overrides)
    folder = Path(out) if out is not None else folders.fresh(checked.method.name)
    stand = Stand(folder)
    with told(stand):
        folders.refuse_occupied(folder)
        with closing(Session(checked.absolute(), folder, progress or Quiet(), stand, connect)) as session:
            folder.mkdir(parents=True, exist_ok=True)
            with files.locked(folder):
                folders.refuse_occupied(folder)  # by another process, while this one loaded
                folders.clear(folder)
                write_recipe(folder / "recipe.yaml", session.recipe.complete())
                write_document(folder / "environment.json", session.environment())
                return session.go()


def resume(folder: str | Path, *, rounds: int | None = None, progress: Progress | None = None, connect: Connect | None = None) -> Record:
    """Continue a run where it stopped, or extend a finished one to `rounds`.

    Other versions than the run's last ones are warned of and noted in `environment.json`; `connect` is that of `run`.

    Raises:
        ValueError: no run folder; another process works in it; fewer rounds than are done; the base model or the data are not those the run
            began with; a machine that lacks memory, space or permission.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder}: not a run folder (it has no recipe.yaml)")
    stand = Stand(folder, at="its last finished round")
    with told(stand), files.locked(folder):
        read_recipe(folder / "recipe.yaml")  # refuses a newer schema
        recipe = load_recipe(folder / "recipe.yaml", [f"federation.rounds={rounds}"] if rounds is not None else None)
        with closing(Session(recipe, folder, progress or Quiet(), stand, connect)) as session:
            now = session.environment()
            origin.check(folder, now)
            folders.clear(folder)
            done = session.restore()
            if rounds is not None:
                if rounds < done:
                    raise ValueError(f"{folder}: {done} rounds are done already; --rounds must not be below that")
                write_recipe(folder / "recipe.yaml", recipe.complete())
            if warning := origin.note_versions(folder, now):
                session.progress.warn(warning)
            return session.go()
