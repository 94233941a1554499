"""What is told of a model that was trained: the run, the rows, the figures, the licences."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

from fedgraft import files, plugins
from fedgraft.moe.plan import locate
from fedgraft.moe.settings import EMBEDDED
from fedgraft.report.record import Record

FIGURES = ("loss", "perplexity", "token_accuracy", "rougeL", "exact_match", "choice_accuracy", "general_loss")
MODELS = ("base", "shared", "personal")
CARD = "README.md"
LICENCE = re.compile(r"^licen[cs]e:\s*(.+)$", re.MULTILINE)
UNSTATED = "not stated in its files; see where it comes from"


def about(record: Record, client: str | None, done: int) -> dict[str, Any]:
    """What a card says of a model of a run, as JSON.

    Args:
        record: the run's.
        client: whose model it is; None: the shared one.
        done: rounds that its leaves have seen.
    """
    recipe, environment = record.recipe, record.environment
    counts: dict[str, dict[str, int]] = environment["clients"]
    data = recipe["data"]
    return {
        "client": client,
        "clients": len(counts),
        "rows": counts.get(client or "", {}) if client else {"all clients": sum(sum(rows.values()) for rows in counts.values())},
        "dataset": data["dataset"],
        "about_data": plugins.first_line("dataset", data["dataset"]),
        "template": data["template"],
        "max_length": data["max_length"],
        "base": _told(recipe["model"]["name"]),
        "on_hub": recipe["model"]["name"] != EMBEDDED and _folder(recipe["model"]["name"]) is None,
        "base_digest": environment["base_digest"],
        "base_licence": licence_of(recipe["model"]["name"]),
        "method": recipe["method"],
        "about_method": plugins.first_line("method", record.method),
        "lora": recipe.get("lora"),
        "graft": recipe.get("graft"),
        "training": {name: recipe["training"][name] for name in ("steps", "batch_size", "lr")},
        "rounds": done,
        "planned": recipe["federation"]["rounds"],
        "run": environment["run"],
        "date": environment["started"],
        "fedgraft": environment["fedgraft"],
        "split": record.split,
        "figures": _figures(record, client),
        "privacy": next((line.get("privacy") for line in record.rounds if line["round"] == done - 1), None),
    }


def licence_of(base: str) -> str:
    """The licence of a base as far as its own files tell."""
    if base == EMBEDDED:
        return "Apache-2.0"
    folder = _folder(base)
    card = folder / CARD if folder is not None else None
    found = LICENCE.search(files.read_text(card)) if card is not None and card.is_file() else None
    return found[1].strip() if found else UNSTATED


def _figures(record: Record, client: str | None) -> dict[str, dict[str, float]]:
    """Model -> figure -> the client's value, or the mean over clients."""
    chosen = {client: record.results[client]} if client in record.results else record.results
    found: dict[str, dict[str, float]] = {}
    for model in MODELS:
        for figure in FIGURES:
            values = [float(models[model][figure]) for models in chosen.values() if figure in models.get(model, {})]
            if values:
                found.setdefault(model, {})[figure] = statistics.fmean(values)
    if client is None and "shared" in found:
        found.pop("personal", None)  # of other leaves than the shared model's
    return found


def _folder(base: str) -> Path | None:
    """The local folder of a base, perhaps gone by now; None for a hub name."""
    try:
        return locate(base)
    except ValueError:
        return Path(base)


def _told(base: str) -> str:
    """The name of a base without where it lies on this machine."""
    folder = _folder(base)
    return base if folder is None or base == EMBEDDED else folder.name
