"""What the coordinator holds of one client of a run: taken out of its merges in a new folder, and deleted where that is asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedgraft import files, folders, plugins
from fedgraft.bundle import Bundle
from fedgraft.evaluation.unseen import held_out
from fedgraft.forgetting import record
from fedgraft.forgetting.redo import Redone, redo, refuse
from fedgraft.kept import Kept
from fedgraft.recipe import Recipe, check_values
from fedgraft.report.html import leave_page
from fedgraft.report.lines import without
from fedgraft.report.record import Record, read_document, write_document, write_recipe

NOTE = "forgotten.json"
APPROXIMATE = (
    "Merging again is not training again: what the others learnt after its first round, they learnt from leaves that had its data in them, "
    "and so has what they keep to themselves. Exact is a new run without its rows"
)


@dataclass(frozen=True, kw_only=True)
class Forgotten:
    """What was found of a client, and what was done."""

    client: str
    run: Path
    rounds: list[int]
    """Rounds, from 0, in whose merge its reply was."""
    holds: list[str]
    """What the run folder held of it when the command began, as paths and parts of files."""
    redone: Path | None
    """The folder of the run without it."""
    why_not: str
    """Why there is none, "" where there is or none is needed."""
    deleted: bool
    remains: list[str] = field(default_factory=list)
    """What the run folder still holds of it now, in words."""
    notes: list[str] = field(default_factory=list)


def forget(folder: Path, client: str, *, out: Path | None = None, delete: bool = False) -> Forgotten:
    """Merge a run again without a client into a new folder, where its replies were kept; then delete, if wished, what is known of it.

    Args:
        folder: the run, which is not running. Without `delete` it stays as it is.
        client: who is to be forgotten.
        out: the new folder; None is the run's with `-without-<client>` behind its name. One that an earlier call made for this client
            stays.
        delete: remove memory, replies, rows' figures and all figures by name from the run folder. Its merged leaves stay.

    Raises:
        ValueError: no run folder, or it is being worked in; no such client; the new folder is there.
    """
    found = Record.load(folder)
    known = sorted(set(found.environment.get("client_digests", {})) | {name for line in found.rounds for name in line["clients"]})
    if client not in known:
        raise ValueError(f"{folder}: knows no client {client!r}{plugins.nearest(client, known)}; there are: {', '.join(known)}")
    with files.locked(folder):
        recipe = check_values(found.recipe, str(folder / "recipe.yaml"))
        rounds = [line["round"] for line in found.rounds if client in line["clients"]]
        holds = _holds(folder, client)
        target = out or folder.with_name(f"{folder.resolve().name}-without-{client}")
        why_not, notes = _cannot(recipe, folder, rounds), list[str]()
        redone = None
        if rounds and not why_not:
            redone = target
            if not _made_before(target, found, client):
                folders.refuse_occupied(target)
                try:
                    notes += _remake(folder, recipe, found, client, target)
                except ValueError as error:  # what is left of the replies must not stand in the way of deleting it
                    redone, why_not = None, str(error)
        if delete:
            _delete(folder, recipe, client)
        return Forgotten(
            client=client,
            run=folder,
            rounds=rounds,
            holds=holds,
            redone=redone,
            why_not=why_not,
            deleted=delete,
            remains=_remains(folder, client, rounds, deleted=delete),
            notes=[*notes, *([f"{APPROXIMATE}."] if redone else [])],
        )


def _cannot(recipe: Recipe, folder: Path, rounds: list[int]) -> str:
    """Why the merges can't be done again."""
    if not Kept(folder).folder.is_dir():
        return "its replies were not kept (engine.keep_replies was off)" if rounds else ""
    try:
        refuse(recipe.build_method())
    except ValueError as error:
        return str(error)
    return ""


def _remake(folder: Path, recipe: Recipe, found: Record, client: str, target: Path) -> list[str]:
    """The run without the client, in a new folder that appears when it is whole; what is to be said of it."""
    end = Bundle.load(folder / "state" / "state.safetensors")
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        made = redo(recipe, _trained(recipe, found), Kept(folder), end, client, Kept(aside))
        made.state.save(aside / "state" / "state.safetensors")
        record.write_without(folder, aside, client)
        for other in sorted(without([path.name for path in (folder / "clients").glob("*")], client)):
            shutil.copytree(folder / "clients" / other, aside / "clients" / other)
        if (folder / "federation.json").is_file():
            shutil.copy(folder / "federation.json", aside)
        notes = _said(made)
        write_document(aside / NOTE, {**_note(found, client), "digest": made.state.digest(), "notes": [*notes, APPROXIMATE]})
        write_recipe(aside / "recipe.yaml", _recipe_without(found.recipe, client))
        leave_page(aside)
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return notes


def _said(made: Redone) -> list[str]:
    notes = []
    if made.short:
        rounds = ", ".join(str(number + 1) for number in made.short)
        notes.append(f"Without it the merge had too few replies in round {rounds}, which left the leaves as they were.")
    if made.chosen_before:
        notes.append("What all share was chosen before the first round with its choice among the others', and stays.")
    return notes


def _trained(recipe: Recipe, found: Record) -> list[str]:
    """Who federated in the run."""
    rows = {name: sum(counts.values()) for name, counts in found.environment["clients"].items()}
    rows |= {name: splits["train"] for name, splits in found.environment.get("rows", {}).items()}
    unseen = held_out(recipe.evaluation.unseen, rows, recipe.build_method(), recipe.seed)
    return [name for name in rows if name not in unseen]


def _recipe_without(values: Mapping[str, Any], client: str) -> dict[str, Any]:
    """The recipe for those that are left: it waits for one site fewer, and does not name the client."""
    engine, federation = dict(values["engine"]), dict(values["federation"])
    if engine["name"] == "flower":
        engine["clients"] = max(1, engine["clients"] - 1)
    if isinstance(federation["join"], dict):
        federation["join"] = without(federation["join"], client)
    return {**values, "engine": engine, "federation": federation}


def _note(found: Record, client: str) -> dict[str, Any]:
    return {"client": client, "run": found.environment.get("run"), "time": datetime.now(UTC).isoformat(timespec="seconds")}


def _made_before(target: Path, found: Record, client: str) -> bool:
    """Whether an earlier call made this folder of this run."""
    note = read_document(target / NOTE)
    return bool(note) and (note["client"], note["run"]) == (client, found.environment.get("run"))


def _files(folder: Path, client: str) -> list[Path]:
    """Files and folders that are the client's alone."""
    own = [folder / "clients" / client, folder / "evaluation" / f"{client}.jsonl", *Kept(folder).of(client)]
    return [path for path in own if path.exists()]


def _holds(folder: Path, client: str) -> list[str]:
    return [*(str(path.relative_to(folder)) for path in _files(folder, client)), "its figures by name in the files of the record"]


def _delete(folder: Path, recipe: Recipe, client: str) -> None:
    """Remove what is known of the client by name. The note comes last: with it all is done; before, the command can be repeated."""
    for path in _files(folder, client):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "now.json").unlink(missing_ok=True)
    run = read_document(folder / "environment.json").get("run")
    record.strike(folder, client, recipe.seed, recipe.evaluation.resamples)
    leave_page(folder)
    write_document(folder / NOTE, {"client": client, "run": run, "time": datetime.now(UTC).isoformat(timespec="seconds")})


def _remains(folder: Path, client: str, rounds: list[int], *, deleted: bool) -> list[str]:
    """What is left of the client in the run folder and near it."""
    remains = []
    if rounds:
        spans = f"{rounds[0] + 1} to {rounds[-1] + 1}" if len(rounds) > 1 else f"{rounds[0] + 1}"
        remains.append(f"its contributions of {len(rounds)} rounds ({spans}) in the merged leaves of {folder / 'state'}")
        remains += (
            [f"what the others have learnt from these leaves, in {folder / 'clients'}"] if any((folder / "clients").glob("*")) else []
        )
    if not deleted:
        remains.append("all that the folder held of it")
    if (folder / "track").is_dir():
        remains.append(f"its figures by name with the trackers, in {folder / 'track'} and wherever they were sent")
    if (origin := read_document(folder / "federation.json").get("federation")) is not None:
        remains.append(f"its name and losses in the events and logs of the federation: {Path(origin) / 'jobs'}, {Path(origin) / 'logs'}")
    return remains
