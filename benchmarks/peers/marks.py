"""Moments that a contestant notes for the driver."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

WORK, OUT = "PEERS_WORK", "PEERS_OUT"
"""Environment variables that the driver sets: the folder that `prepare.py` wrote, and that of this contestant's marks."""


class Marks:
    """Moments of a contestant, appended to one file by any of its processes; a line is one write."""

    def __init__(self) -> None:
        self.path = Path(os.environ[OUT]) / "marks.jsonl"
        self._first = True

    def stepped(self) -> None:
        """An optimiser step is done; only a process's first is noted."""
        if self._first:
            self._note(event="step")
        self._first = False

    def trained(self, client: str, number: int, loss: float) -> None:
        """A client's part of a round is done, with the mean loss of its steps."""
        self._note(event="client", client=client, round=number, loss=loss)

    def round_done(self, **facts: Any) -> None:
        """A round is merged."""
        self._note(event="round", **facts)

    def _note(self, **facts: Any) -> None:
        line = json.dumps({"at": time.time(), **facts}) + "\n"
        with self.path.open("ab", buffering=0) as sink:
            sink.write(line.encode())
