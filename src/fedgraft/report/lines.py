"""The lines of `rounds.jsonl`: what is told of a round, and the same without one client."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgraft import files

TOLD = ("loss", "tokens", "seconds", "examples", "truncated")
"""What is kept of a reply."""


def round_line(
    number: int,
    lr: float,
    seconds: float,
    traffic: Mapping[str, int],
    replies: Mapping[str, Mapping[str, Any]],
    *,
    simulated: Mapping[str, Any],
    failures: Mapping[str, str],
    left: Collection[str],
    unopened: str = "",
) -> dict[str, Any]:
    """The line of a finished round.

    Args:
        number: of the round, from 0.
        lr: the clients' learning rate.
        seconds: wall clock.
        traffic: bytes_down, bytes_up.
        replies: the facts of each merged reply.
        simulated: what the recipe had happen.
        failures: client -> why it has no reply.
        left: clients that have withdrawn, nothing of which is in this round.
        unopened: why the sum of the replies stayed closed, so that nothing was merged.
    """
    clients = {name: {key: facts[key] for key in TOLD if key in facts} for name, facts in replies.items()}
    return {
        "round": number,
        "lr": lr,
        "loss": _mean_loss(clients),
        "seconds": round(seconds, 4),
        "tokens": _tokens(clients),
        **traffic,
        "clients": clients,
        **({"simulated": dict(simulated)} if simulated else {}),
        **({"failed": dict(failures)} if failures else {}),
        **({"left": sorted(left)} if left else {}),
        **({"unopened": unopened} if unopened else {}),
    }


def line_without(line: Mapping[str, Any], client: str) -> dict[str, Any]:
    """The line with nothing by this client's name, and with sums and means from which it cannot be worked out."""
    found = dict(line)
    if client in line["clients"]:
        clients = {name: facts for name, facts in line["clients"].items() if name != client}
        found |= {"loss": _mean_loss(clients), "tokens": _tokens(clients), "clients": clients}
    for key in ("failed", "left"):
        if key in line and not (found.update({key: without(line[key], client)}) or found[key]):
            del found[key]
    if "simulated" in line:
        found["simulated"] = {key: kept for key, value in line["simulated"].items() if (kept := without(value, client))}
        if not found["simulated"]:
            del found["simulated"]
    return found


def without(value: Any, client: str) -> Any:
    """Names, or what is known by name, without this one."""
    if isinstance(value, Mapping):
        return {name: inner for name, inner in value.items() if name != client}
    return [name for name in value if name != client]


def drop_from(path: Path, rounds: int) -> None:
    """Drop the lines of rounds that are not finished, also half a line, from a `rounds.jsonl`."""
    write_lines(path, [line for line in files.read_lines(path) if line["round"] < rounds])


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Make these the lines of a `rounds.jsonl`; one that has them already, or that isn't there and needn't be, is left alone."""
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    if content != (path.read_bytes() if path.exists() else b""):
        files.write_bytes(path, content)


def left_since(lines: Sequence[Mapping[str, Any]], left: Collection[str] = (), rounds: int = 0) -> dict[str, int]:
    """Client that has withdrawn -> the first round without it.

    Args:
        lines: of the finished rounds.
        left: clients that have withdrawn by now.
        rounds: how many are finished.
    """
    found: dict[str, int] = dict.fromkeys(sorted(left), rounds)
    for line in reversed(lines):
        found |= dict.fromkeys(line.get("left", ()), line["round"])
    return found


def _mean_loss(clients: Mapping[str, Mapping[str, Any]]) -> float | None:
    losses = [facts["loss"] for facts in clients.values() if "loss" in facts]
    return sum(losses) / len(losses) if losses else None


def _tokens(clients: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(facts.get("tokens", 0) for facts in clients.values())
