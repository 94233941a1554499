"""The end of a run on disk: digests, then `results.json`, with which it is finished."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedgraft import files
from fedgraft.bundle import Bundle
from fedgraft.report.lines import left_since
from fedgraft.report.record import write_document
from fedgraft.report.summary import summarise
from fedgraft.tree import digest_of_digests


def write_results(
    folder: Path,
    found: Mapping[str, Any],
    *,
    state: Bundle,
    clients: Mapping[str, str],
    left: Collection[str],
    seed: int,
    resamples: int,
) -> None:
    """Write what a finished run came to.

    Args:
        folder: of the run.
        found: `split`, `clients` and what else was measured or spent.
        state: the server's.
        clients: digest of each memory, where this process can read them.
        left: clients that have withdrawn by now.
        seed: of the run.
        resamples: of each interval.
    """
    done, own = state.facts["round"], state.digest()
    assert isinstance(done, int)
    write_document(folder / "digest.json", {"state": own, "clients": dict(clients)})
    files.write_text(folder / "digest.txt", digest_of_digests([own, *(clients[name] for name in sorted(clients))]) + "\n")
    results = {"rounds": done, **found, "summary": summarise(found["clients"], seed, resamples)}
    since = left_since(files.read_lines(folder / "rounds.jsonl"), left, done)
    write_document(folder / "results.json", {**results, **({"left": since} if since else {})})
