"""Submitting a run to a federation and looking on until it ends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedgraft import folders
from fedgraft.deployment import job as jobs
from fedgraft.deployment.federation import Federation, find, running
from fedgraft.deployment.job import Job
from fedgraft.deployment.relay import Onlooker
from fedgraft.engine.settings import FlowerSettings
from fedgraft.recipe import load_recipe
from fedgraft.report.progress import Progress, Quiet
from fedgraft.report.record import Record
from fedgraft.signals import deferred
from fedgraft.trouble import Stopped

if TYPE_CHECKING:
    from fedgraft.engine.control import Control

POLL = 0.2  # seconds between looks at what the run reports
ASK = 2.0  # seconds between questions whether it still runs
PATIENCE = 60.0  # seconds for a run that was told to stop


def run_on(
    place: str | Path, recipe: str | None, *, out: Path | None = None, overrides: list[str] | None = None, progress: Progress
) -> Record:
    """Run a recipe on the sites of a federation into a new folder on this machine.

    Args:
        place: folder or name of the federation, whose coordinator runs here.
        recipe: as `runner.run`; with an engine other than `flower`, all sites that are let in are waited for.
        out: the run folder; None makes one under the federation's `runs/`.
        overrides: as `runner.run`.
        progress: hears what the run reports.

    Raises:
        ValueError: as `runner.run`; no federation there; no coordinator runs.
        Stopped: the run was stopped and can be resumed.
    """
    federation = find(place)
    checked = load_recipe(recipe, overrides)
    if not isinstance(checked.engine, FlowerSettings):
        number = len(federation.sites())
        if not number:
            raise ValueError(
                f"{federation.folder}: has no sites yet; let some in with: fedgraft federation add-site {federation.folder} NAME"
            )
        checked = checked.model_copy(update={"engine": FlowerSettings(name="flower", clients=number)})
    folder = (out or federation.folder / folders.fresh(checked.method.name)).absolute()
    folders.refuse_occupied(folder)
    values = checked.absolute().model_dump(mode="json", exclude_unset=True)
    return _finished(federation, jobs.new(federation.folder, folder, values), progress)


def resume_on(place: str | Path, folder: Path, *, rounds: int | None = None, progress: Progress) -> Record:
    """Continue or extend a run on the sites of its federation.

    Raises:
        ValueError: as `runner.resume`; no federation there; no coordinator runs.
        Stopped: the run was stopped and can be resumed.
    """
    federation = find(place)
    Record.load(folder)  # refuses what is no run folder
    return _finished(federation, jobs.new(federation.folder, folder, None, rounds), progress)


def _finished(federation: Federation, job: Job, progress: Progress) -> Record:
    try:
        carry_out(federation, job, progress)
    except KeyboardInterrupt as stop:
        if (job.out / "recipe.yaml").exists():
            raise Stopped(job.out) from stop
        raise
    finally:
        progress.close()
    return Record.load(job.out)


def carry_out(federation: Federation, job: Job, progress: Progress, app: Mapping[str, str] | None = None) -> None:
    """Start the job's run and pass on its progress until it has ended.

    Args:
        federation: whose coordinator runs on this machine.
        job: not yet written down.
        progress: hears what the run reports.
        app: another app than fedgraft's own.

    Raises:
        ValueError: no coordinator runs; the run could not go on (its own words, with where it stands).
        KeyboardInterrupt: the command was stopped; the run is, too.
    """
    from fedgraft.engine.control import Control

    refuse_absent(federation)
    control = Control(federation.local_address, federation.certificate)
    try:
        if not federation.settings.insecure:
            job = dataclasses.replace(job, nodes={node.id: node.name for node in control.nodes()})
        job.save()
        number = control.start(app or jobs.bundle(), {"job": job.number})
        try:
            trouble = _look_on(control, number, job, progress)
        except KeyboardInterrupt:
            with deferred():
                control.stop(number)
                _await_end(control, number, job)
            raise
        if trouble:
            raise ValueError(trouble)
    finally:
        control.close()


def refuse_absent(federation: Federation) -> None:
    """Let only a federation pass whose coordinator runs here.

    Raises:
        ValueError: it does not.
    """
    if running(federation) is None:
        raise ValueError(
            f"{federation.folder}: no coordinator runs on this machine; start it with: fedgraft coordinator {federation.folder}"
        )


def _look_on(control: Control, number: int, job: Job, progress: Progress) -> str:
    """How the run ended: "" when well."""
    onlooker, asked = Onlooker(job.events, progress), 0.0
    while True:
        over = None
        if time.monotonic() - asked >= ASK:
            over = next((run for run in control.runs() if run.id == number and run.over), None)
            asked = time.monotonic()
        onlooker.look()
        jobs.note_origin(job.out, job.federation)
        if onlooker.ended is not None:
            return onlooker.ended
        if over is not None:
            why = over.details or over.outcome
            return f"the run ended without a word ({why}); more in {job.federation / 'logs' / 'superlink.log'}"
        time.sleep(POLL)


def _await_end(control: Control, number: int, job: Job) -> None:
    """A run that is told to stop finishes what it is writing."""
    onlooker, deadline = Onlooker(job.events, Quiet()), time.monotonic() + PATIENCE
    while onlooker.ended is None and time.monotonic() < deadline:
        onlooker.look()
        if not job.events.exists() and all(run.over for run in control.runs() if run.id == number):
            return  # it had not begun
        time.sleep(POLL)
