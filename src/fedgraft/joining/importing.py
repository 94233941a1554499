"""A recipe that goes on from leaves which are there already, its section `lora` filled in to fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fedgraft.grafts.lora import LoraSettings
from fedgraft.handover.found import Found, read, recipe_of
from fedgraft.handover.start import rank_of, targets_of
from fedgraft.moe.family import Anatomy
from fedgraft.moe.settings import ModelSettings
from fedgraft.moe.skeleton import skeleton
from fedgraft.recipe import load_recipe
from fedgraft.starter.keys import unused_sections
from fedgraft.starter.suggest import suggest
from fedgraft.starter.text import commented

NOTES = {
    "lora.init": "where the leaves lie; each run checks that they are still the same",
    "lora.rank": "theirs",
    "lora.alpha": "theirs, so that they are taken over bit for bit",
    "lora.targets": "what they adapt",
    "model.name": "the base they were trained on",
}


def continuing(
    source: str | Path, *, data: str | None = None, model: str | None = None, method: str | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """(section -> key -> value, `section.key` -> why) of a recipe that starts from `source`.

    Of a run without `data` it is the run's own recipe, with its clients.

    Args:
        source: a PEFT adapter, an export in fedgraft's own format, or a run folder.
        data: the rows to go on with, as for `suggest`; None: those of the run.
        model: the base; None: what the source says.
        method: how to go on; None: as the run, or flex.

    Raises:
        ValueError: nothing to start from, no base known, a method that has no adapters, or as `suggest`.
    """
    source = Path(source).expanduser().resolve()
    known = recipe_of(source)
    base = {**known.get("model", {}), **({"name": model} if model else {})}
    if not base.get("name"):
        raise ValueError(f"{source}: does not say which base it is of; name it with --model")
    whole = "federation" in known
    if data is None and not whole:
        raise ValueError(f"{source}: tells of no rows to go on with; name them with --data")
    chosen = method or (known["method"]["name"] if whole else "flex")
    values, notes = dict(known), dict[str, str]()
    if data is not None:
        start = suggest(data, model=str(base["name"]), method=chosen)
        values, notes = {part: dict(keys) if isinstance(keys, dict) else keys for part, keys in start.values.items()}, dict(start.notes)
    elif method:
        values = {part: keys for part, keys in values.items() if part not in unused_sections(method)} | {"method": {"name": method}}
    if "lora" in unused_sections(chosen):
        raise ValueError(f"--method {chosen}: it has no adapters that could start from these; choose another")
    settings = ModelSettings.model_validate(base)
    values["model"] = {**values.get("model", {}), **base}
    anatomy = skeleton(settings)
    values["lora"] = {**values.get("lora", {}), **lora_of(read(source, anatomy), anatomy), "init": str(source)}
    load_recipe(values)
    return values, notes | NOTES


def lora_of(found: Found, anatomy: Anatomy) -> dict[str, Any]:
    """The section `lora` with which these leaves are taken over as they are, as far as one scale serves all.

    Raises:
        ValueError: they adapt a part of some layers that no `lora.targets` names.
    """
    rank, targets = rank_of(found.tree), targets_of(found, anatomy)
    if targets is None:
        raise ValueError(f"{found.file}: adapts a part of the layers that no lora.targets name, so a run can't start from it")
    scale = next(scale for head, scale in found.scales.items() if len(found.tree[f"{head}.A"]) == rank)
    settings = LoraSettings.model_validate({"rank": rank, "alpha": scale * rank, "dropout": found.dropout, "targets": targets})
    return settings.model_dump(mode="json", exclude={"init"})


def in_yaml(values: dict[str, Any], notes: dict[str, str], heading: str) -> str:
    """The recipe as a file that explains itself; one of a whole run, with sections of other kinds than the usual, as it is."""
    if "engine" not in values:
        return commented(values, notes, heading)
    return f"# {heading.partition('. ')[0]}.\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}"
