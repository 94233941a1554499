"""Counters in the text format of Prometheus."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable

import psutil

HELP = {
    "requests_total": "Requests by model and HTTP status; `none` where no served model was named.",
    "prompt_tokens_total": "Tokens of the prompts that were read.",
    "answer_tokens_total": "Tokens that were written.",
    "answers_total": "Answers by model and by why they ended.",
    "forwards_total": "Forwards of the base.",
    "forward_rows_total": "Rows of all forwards; divided by the forwards, the mean batch.",
    "waiting_seconds_total": "Seconds that answered requests waited for a place in the batch.",
    "answer_seconds_total": "Seconds from the arrival of answered requests to their last token.",
    "waiting": "Requests that wait for a place in the batch.",
    "running": "Answers in the making.",
    "resident_bytes": "Memory of the server.",
}


class Metrics:
    """Sums since the start; thread-safe."""

    def __init__(self) -> None:
        self._sums: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        self._gauges: dict[str, Callable[[], float]] = {"resident_bytes": lambda: float(psutil.Process().memory_info().rss)}
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Raise a counter of `HELP`."""
        with self._lock:
            self._sums[name, tuple(sorted(labels.items()))] += amount

    def watch(self, name: str, read: Callable[[], float]) -> None:
        """Show what `read` returns whenever somebody looks."""
        self._gauges[name] = read

    def text(self) -> str:
        """All of it, one line a value."""
        with self._lock:
            sums = sorted(self._sums.items())
        lines = []
        for name, words in HELP.items():
            own = [(labels, value) for (counter, labels), value in sums if counter == name]
            if name in self._gauges:
                own = [((), self._gauges[name]())]
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP fedgraft_{name} {words}", f"# TYPE fedgraft_{name} {kind}"]
            lines += [
                f"fedgraft_{name}{_shown(labels)} {value:g}" if value < 1e6 else f"fedgraft_{name}{_shown(labels)} {value:.0f}"
                for labels, value in own
            ]
        return "\n".join(lines) + "\n"


def _shown(labels: tuple[tuple[str, str], ...]) -> str:
    escaped = (f'{key}="{_escaped(value)}"' for key, value in labels)
    return "{" + ",".join(escaped) + "}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
