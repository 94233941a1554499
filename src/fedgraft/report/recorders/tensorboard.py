"""Event files in the run folder; look at many runs with `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedgraft.report.recording import About, flat

PACKAGE = "tensorboard"


class _EventFiles:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def note(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def start(about: About) -> _EventFiles:
    """A new event file; the recipe as text beside the first."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(about.folder))
    if not about.first:
        rows = "\n".join(f"| {key} | {value} |" for key, value in flat(about.recipe).items())
        writer.add_text("recipe", f"| key | value |\n|---|---|\n{rows}", 0)
    return _EventFiles(writer)
