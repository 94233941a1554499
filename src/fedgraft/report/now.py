"""`now.json`: what a run is doing this moment, for whoever looks at its folder from outside.

It is a note, not a part of the record: overwritten in place about once a second, gone when the run has finished, and never read by a run. A
reader may meet half of it. What could not be written is not missed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedgraft.report.progress import Progress

FILE = "now.json"
EVERY = 1.0  # seconds


class Noting:
    """Passes progress on and notes it.

    `state` is `running`, or how the run ended (`stopped`, or `failed: <why>`); `done` of `total` steps of `phase`, with the share of the
    step in hand, called `title`; its `loss`; `time`, `process` and `host` tell whether that still holds.
    """

    def __init__(self, progress: Progress, folder: Path) -> None:
        self.progress, self.path = progress, folder / FILE
        self.facts: dict[str, Any] = {"state": "running", "phase": "", "done": 0, "total": 0, "title": "", "loss": None}
        self.last = 0.0

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps starts."""
        self.progress.begin(phase, total)
        self.note(phase=phase, total=total, done=0, title="", loss=None)

    def part(self, client: str, title: str, done: int, total: int, loss: float | None = None, note: str = "") -> None:
        """A part of a step is done."""
        self.progress.part(client, title, done, total, loss, note)
        if time.monotonic() - self.last >= EVERY:
            share = int(self.facts["done"]) + min(done / total, 0.999)
            self.note(done=round(share, 3), title=" ".join(filter(None, (title, note))), loss=loss)

    def step(self, note: str = "") -> None:
        """One step is done."""
        self.progress.step(note)
        self.facts["done"] = int(self.facts["done"]) + 1
        if time.monotonic() - self.last >= EVERY:
            self.note(title=note, loss=None)

    def warn(self, text: str) -> None:
        """Something that the user should know."""
        self.progress.warn(text)

    def tell(self, rows: Sequence[tuple[str, str]]) -> None:
        """Something worth reading, as (label, text) a line."""
        self.progress.tell(rows)

    def close(self) -> None:
        """Nothing more comes."""
        self.progress.close()

    def note(self, **facts: Any) -> None:
        """Write what is known, with these facts changed."""
        self.last = time.monotonic()
        self.facts |= facts
        known = {**self.facts, "time": round(time.time(), 3), "process": os.getpid(), "host": platform.node()}
        with contextlib.suppress(OSError), self.path.open("wb") as sink:
            sink.write(json.dumps(known, ensure_ascii=False).encode())


@contextmanager
def noting(progress: Progress, folder: Path) -> Iterator[Noting]:
    """Progress that is noted too, and at the end of the block how it ended."""
    noted = Noting(progress, folder)
    noted.note(phase="starting")
    try:
        yield noted
    except KeyboardInterrupt:
        noted.note(state="stopped")
        raise
    except BaseException as error:
        noted.note(state=f"failed: {' '.join(str(error).split()) or type(error).__name__}")
        raise
    with contextlib.suppress(OSError):
        noted.path.unlink(missing_ok=True)
