"""The coordinator's end of a run, inside the process that Flower starts for it: a job of this disk, run over the grid."""

from __future__ import annotations

import os
import signal
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from fedgraft import files, runner
from fedgraft.deployment import job as jobs
from fedgraft.deployment.federation import find
from fedgraft.deployment.job import VARIABLE, Job
from fedgraft.deployment.relay import Relay
from fedgraft.engine.serverapp import server_app
from fedgraft.reach import over
from fedgraft.signals import terminating

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

STOPPED = "stopped"
"""What the events end with when the run was told to stop."""


def serve(grid: Grid, context: Context) -> None:
    """Run or continue the job whose number the run was started with; what happens is left in its events.

    Raises:
        ValueError: the process knows no federation, or there is no such job.
    """
    if VARIABLE not in os.environ:
        raise ValueError("this SuperLink was not started by fedgraft; start it with: fedgraft coordinator FOLDER")
    job = jobs.load(Path(os.environ[VARIABLE]), str(context.run_config["job"]))
    relay = Relay(job.events)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # how Flower tells that the run is to stop
    trouble = STOPPED
    try:
        with terminating():
            _carry_out(job, grid, relay)
        trouble = ""
    except (ValueError, OSError) as error:
        trouble = str(error)
        raise
    except Exception as error:
        trouble = f"{type(error).__name__}: {error}\nThe traceback is in {job.log}"
        files.write_text(job.log, traceback.format_exc())
        raise
    finally:
        relay.end(trouble)


def _carry_out(job: Job, grid: Grid, relay: Relay) -> None:
    connect = over(grid, job.nodes, find(job.federation).admits)
    if job.recipe is None:
        runner.resume(job.out, rounds=job.rounds, progress=relay, connect=connect)
    else:
        runner.run(job.recipe, out=job.out, progress=relay, connect=connect)


server = server_app(serve)
