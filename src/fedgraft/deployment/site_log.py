"""The site's log: one JSON line for everything that was asked, written before anything leaves. What was spent is read from it again."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedgraft import files
from fedgraft.address import place_of
from fedgraft.bundle import Outline
from fedgraft.deployment.policy import Spent


@dataclass
class SiteLog:
    """Appends lines, and sums what has left. One process at a time may hold it."""

    path: Path

    def __post_init__(self) -> None:
        """Read what is there; a line that a crash cut short is dropped, since nothing left on its account.

        Raises:
            ValueError: a line is damaged.
        """
        self._total, self._rounds = 0, dict[str, set[str]]()
        for line in files.read_lines(self.path):
            self._count(line)
        if self.path.exists():
            content = self.path.read_bytes()
            complete = content[: content.rfind(b"\n") + 1]
            if complete != content:
                files.write_bytes(self.path, complete)

    def spent(self, run: str) -> Spent:
        """What has left so far, as it matters for a run."""
        return Spent(total_bytes=self._total, rounds=frozenset(self._rounds.get(run, ())))

    def write(self, verdict: str, **what: Any) -> None:
        """Append one line: `time`, `verdict` (answered, refused, failed, loaded) and what else is known.

        Raises:
            OSError: it cannot be written, so nothing may leave.
        """
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "verdict": verdict, **what}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.append_line(self.path, line)
        self._count(line)

    def _count(self, line: dict[str, Any]) -> None:
        if line["verdict"] == "answered":
            self._total += line["bytes"]
            if line.get("question") == "train":
                self._rounds.setdefault(line["run"], set()).add(line["fingerprint"])


def told(content: Outline) -> dict[str, Any]:
    """What a reply tells, for a line of the log: per tree the number of leaves, their bytes and places, and the names of the facts."""
    trees = {
        name: {"leaves": len(leaves), "bytes": sum(leaves.values()), "places": sorted({place_of(address) for address in leaves})}
        for name, leaves in content.trees.items()
        if leaves
    }
    return {"trees": trees, "facts": sorted(content.facts)}
