"""The files of a run's record without what they say of one client by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedgraft import files
from fedgraft.report.lines import line_without, without, write_lines
from fedgraft.report.record import read_document, write_document
from fedgraft.report.summary import summarise

BY_CLIENT = ("clients", "experts", "unseen", "cross", "left")
"""Parts of `results.json` whose keys are clients."""


def environment_without(found: Mapping[str, Any], client: str) -> dict[str, Any]:
    """What the run ran on, without the client's rows and digest."""
    kept = {key: without(found[key], client) for key in ("clients", "client_digests", "rows") if key in found}
    digests = kept.get("client_digests", {})
    return {**found, **kept, "data_digest": hashlib.sha256("\n".join(digests.values()).encode()).hexdigest()}


def results_without(found: Mapping[str, Any], client: str, seed: int, resamples: int) -> dict[str, Any]:
    """The results, with means from which the client's figures cannot be worked out."""
    kept = {part: without(found[part], client) for part in BY_CLIENT if part in found}
    if "cross" in kept:
        kept["cross"] = {owner: without(row, client) for owner, row in kept["cross"].items()}
    return {**found, **kept, "summary": summarise(kept["clients"], seed, resamples)}


def lines_without(folder: Path, client: str) -> list[dict[str, Any]]:
    """The lines of `rounds.jsonl`."""
    return [line_without(line, client) for line in files.read_lines(folder / "rounds.jsonl")]


def write_without(source: Path, target: Path, client: str) -> None:
    """Write `rounds.jsonl`, `environment.json` and `selection.json` of a run into a folder, which may be the run's own."""
    if chosen := read_document(source / "selection.json"):
        write_document(target / "selection.json", _document({**chosen, "clients": without(chosen["clients"], client)}))
    write_lines(target / "rounds.jsonl", lines_without(source, client))
    write_document(target / "environment.json", _document(environment_without(read_document(source / "environment.json"), client)))


def strike(folder: Path, client: str, seed: int, resamples: int) -> None:
    """Write a run's whole record anew without the client; the file by which it is known to the run comes last."""
    if results := read_document(folder / "results.json"):
        write_document(folder / "results.json", _document(results_without(results, client, seed, resamples)))
    if digests := read_document(folder / "digest.json"):
        write_document(folder / "digest.json", _document({**digests, "clients": without(digests["clients"], client)}))
    write_without(folder, folder, client)


def _document(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "schema"}
