"""Where else than into the run folder's own files a run's figures go."""

from __future__ import annotations

from fedgraft.settings import Section


class RecordSettings(Section):
    """The record of a run is always written into its folder (`rounds.jsonl`, `results.json`); here others are told as well."""

    to: tuple[str, ...] = ()
    """Recorders, extra `track`: `tensorboard`, `wandb` (offline unless WANDB_MODE says otherwise), `mlflow` (a file in the run folder
    unless MLFLOW_TRACKING_URI names a server)."""
    project: str = "fedgraft"
    """The project (Weights & Biases) or experiment (MLflow) that the run belongs to."""
