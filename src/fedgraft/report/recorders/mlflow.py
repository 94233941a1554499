"""MLflow, a file in the run folder unless MLFLOW_TRACKING_URI names another place; look with `mlflow ui --backend-store-uri`."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from typing import Any

from fedgraft import files
from fedgraft.report.recording import About, flat

PACKAGE = "mlflow"
RUN = "run.txt"
FORBIDDEN = re.compile(r"[^\w\-. /:]")  # in the names of metrics
BATCH, LONGEST = 100, 6000  # parameters a call, characters of one


class _Store:
    def __init__(self, client: Any, run: str) -> None:
        self.client, self.run = client, run

    def note(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(FORBIDDEN.sub("_", name), value, now, step) for name, value in figures.items()]
        for first in range(0, len(metrics), BATCH):
            self.client.log_batch(self.run, metrics=metrics[first : first + BATCH])

    def close(self) -> None:
        self.client.set_terminated(self.run)


def start(about: About) -> _Store:
    """The run whose id stands in `run.txt`, or a new one with the recipe as its parameters."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing leaves the machine unasked
    from mlflow import MlflowClient
    from mlflow.entities import Param

    for name in ("mlflow", "alembic"):  # which tell of every table they make
        logging.getLogger(name).setLevel(logging.WARNING)
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(about.folder / 'mlflow.db').resolve().as_posix()}")
    place = about.folder / RUN
    if place.is_file():
        return _Store(client, files.read_text(place).strip())
    found = client.get_experiment_by_name(about.project)
    experiment = found.experiment_id if found else client.create_experiment(about.project)
    run = client.create_run(experiment, run_name=about.run).info.run_id
    parameters = [Param(key, str(value)[:LONGEST]) for key, value in flat(about.recipe).items()]
    for first in range(0, len(parameters), BATCH):
        client.log_batch(run, params=parameters[first : first + BATCH])
    files.write_text(place, run + "\n")
    return _Store(client, run)
