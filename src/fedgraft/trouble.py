"""How a run ends before its end: stopped, or for what a machine lacks (memory, disk space, permission), told with what is safe."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedgraft.moe.memory import means_out_of_memory
from fedgraft.report.record import resume_command

NO_SPACE = {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
TRAINING = (
    "raise training.accumulation up to training.batch_size, set training.checkpointing: true (neither changes what is learnt), "
    "or lower training.batch_size or data.max_length, or set model.dtype: bfloat16"
)
LOWER = {
    "loading": "set model.dtype: bfloat16, take a smaller model.name, or close other programs",
    "selection": "lower selection.tokens, graft.per_layer or data.max_length, or set model.dtype: bfloat16",
    "training": TRAINING,
    "finishing": TRAINING,
    "evaluation": "lower evaluation.batch_size (this changes nothing else), evaluation.max_new_tokens or data.max_length",
}
"""What to lower when memory runs out, by phase."""


@dataclass
class Stand:
    """Where a run stands."""

    folder: Path
    at: str = "its start"
    """The last commit, in words."""
    phase: str = "loading"
    client: str = ""
    """The client last asked in this phase."""

    def safe(self) -> str:
        """What is saved and how to go on."""
        recipe = self.folder / "recipe.yaml"
        if not recipe.exists():
            return "Nothing was begun"
        return f"Nothing is lost: the run stands at {self.at}, its settings are in {recipe}; continue with: {resume_command(self.folder)}"


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM (then the cause is `signals.Terminated`) in a run; `folder` can be resumed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder


@contextmanager
def told(stand: Stand) -> Iterator[None]:
    """Turn what the machine lacks into a `ValueError` that says where the run stands; other errors pass."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        reason = out_of_memory(error, stand.phase, stand.client) or (disk(error) if isinstance(error, OSError) else "")
        if not reason:
            raise
        raise ValueError(f"{reason}. {stand.safe()}") from error


def out_of_memory(error: BaseException, phase: str, client: str) -> str:
    """The message for an error that means too little memory, of the machine or a GPU; "" for any other."""
    if not means_out_of_memory(error):
        return ""
    who = f" of client {client!r}" if client else ""
    return f"out of memory in {phase}{who} ({_short(error)}): {LOWER[phase]}"


def disk(error: OSError) -> str:
    """The message for a full disk or a forbidden file, naming it; "" for any other error."""
    name = error.filename if error.filename is not None else "a file"
    if error.errno in NO_SPACE:
        return f"{name}: no space left on the disk; free some"
    if error.errno in FORBIDDEN:
        return f"{name}: no permission ({error.strerror}); change its owner or mode, or choose another folder"
    return ""


def _short(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]
