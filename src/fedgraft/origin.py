"""Where a run comes from: what it ran on, with which base model and data; a resume compares them with what it finds."""

from __future__ import annotations

import hashlib
import platform
import secrets
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fedgraft import __version__
from fedgraft.engine.card import Card
from fedgraft.report.record import read_document, write_document
from fedgraft.tree import Tree, digest

PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")


def environment(base: str, cards: Sequence[Card], run: str, start: Tree) -> dict[str, Any]:
    """What the run runs on, and the digests that a resume compares.

    Args:
        base: the base model's name.
        cards: of all clients, who hold the same base.
        run: the run's id.
        start: leaves that it starts from (`lora.init`).
    """
    digests = {card.name: card.data_digest for card in cards}
    return {
        **_versions(cards),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": sys.argv,
        "started": _now(),
        "run": run,
        "base": base,
        "base_digest": cards[0].base_digest,
        "base_notes": list(cards[0].base_notes),
        "data_digest": hashlib.sha256("\n".join(digests.values()).encode()).hexdigest(),
        "client_digests": digests,
        "clients": {card.name: card.categories for card in cards},
        "rows": {card.name: card.rows for card in cards},
        **({"start_digest": digest(start)} if start else {}),
    }


def cards(folder: Path) -> list[Card]:
    """The clients of the run in `folder` as they introduced themselves when it began, devices and threads as of one; [] of a new run."""
    known = read_document(folder / "environment.json")
    return [
        Card(
            name=name,
            rows=rows,
            categories=known["clients"][name],
            data_digest=known["client_digests"][name],
            base_digest=known["base_digest"],
            base_notes=tuple(known["base_notes"]),
            device=known["device"].partition(", ")[0],
            threads=known["threads"][0] if isinstance(known["threads"], list) else known["threads"],
            fedgraft=__version__,
        )
        for name, rows in known.get("rows", {}).items()
    ]


def run_id(folder: Path) -> str:
    """The id by which sites know the run in `folder`: the one it began with, or a new one."""
    known = read_document(folder / "environment.json").get("run")
    return str(known) if known else secrets.token_hex(8)


def check(folder: Path, now: dict[str, Any]) -> None:
    """Refuse another base model or other data than the run in `folder` began with.

    Raises:
        ValueError: another base model, other data, or no record of them.
    """
    path = folder / "environment.json"
    before = read_document(path)
    if not before and not (folder / "state").exists():  # killed before it was written
        write_document(path, now)
        return
    if not before:
        raise ValueError(f"{path}: missing, so what the run began with is unknown; restore the file from a copy, or start a new run")
    if before.get("base_digest") != now["base_digest"]:
        raise ValueError(
            f"{folder}: the base model {now['base']!r} differs from the one this run began with; restore it, or start a new run"
        )
    if before.get("start_digest") != now.get("start_digest"):
        raise ValueError(f"{folder}: the leaves of lora.init differ from those this run began with; restore them, or start a new run")
    known = "client_digests" if "client_digests" in before else "data_digest"
    if before.get(known) != now[known]:
        raise ValueError(f"{folder}: {_changed(before, now)} from those this run began with; restore them, or start a new run")


def note_versions(folder: Path, now: dict[str, Any]) -> str:
    """Note in `environment.json` that the run goes on with other versions than its last ones.

    Returns:
        The warning that the user should see, "" when they are the same.
    """
    path = folder / "environment.json"
    before = read_document(path)
    resumptions = before.get("resumptions", [])
    last = _flat(resumptions[-1] if resumptions else before)
    changes = [f"{name} {last[name]} -> {value}" for name, value in _flat(now).items() if name in last and last[name] != value]
    if not changes:
        return ""
    versions = {name: now[name] for name in ("fedgraft", "packages", "threads", "device")}
    entry = {"date": now["started"], "command": now["command"], **versions}
    write_document(path, {**before, "resumptions": [*resumptions, entry]})
    return f"resumed with {', '.join(changes)}: the result need no longer be equal bit for bit to that of an uninterrupted run"


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Whose data differ, where the record knows."""
    old, new = before.get("client_digests"), now["client_digests"]
    if old is None:
        return "the data differ"
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    gone = [f"{name!r} (it has no data now)" if name not in new else f"{name!r}" for name in changed]
    return f"the data of client{'s' if len(changed) > 1 else ''} {', '.join(gone)} differ"


def _versions(cards: Sequence[Card]) -> dict[str, Any]:
    """What bits depend on besides recipe, base and data."""
    threads = sorted({card.threads for card in cards})
    return {
        "fedgraft": __version__,
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "threads": threads[0] if len(threads) == 1 else threads,
        "device": ", ".join(sorted({card.device for card in cards})),
    }


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    return {"fedgraft": entry["fedgraft"], **entry["packages"], "threads": entry["threads"], "device": entry["device"]}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
