"""Weights & Biases, offline unless WANDB_MODE says otherwise; upload later with `wandb sync`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from fedgraft.report.recording import About

PACKAGE = "wandb"


class _Offline:
    def __init__(self, run: Any) -> None:
        self.run = run

    def note(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def close(self) -> None:
        self.run.finish()


def start(about: About) -> _Offline:
    """A run whose id comes from its folder, so that what a resumed run adds joins what was there."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nothing leaves the machine unasked
    import wandb

    identity = hashlib.sha256(str(about.folder.resolve()).encode()).hexdigest()[:16]
    run = wandb.init(
        project=about.project,
        name=about.run,
        id=identity,
        resume="allow",
        dir=str(about.folder),
        config=about.recipe,
        mode=os.environ.get("WANDB_MODE", "offline"),
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True, save_code=False, disable_git=True),
    )
    return _Offline(run)
