"""All that is known of a base, and decided about it, before its weights are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fedgraft.moe.architecture import Architecture, hub_commit, read_architecture
from fedgraft.moe.checkpoint import Checkpoint, inspect_folder
from fedgraft.moe.family import Site
from fedgraft.moe.memory import Needed, Room, gib, needed_by, room_for
from fedgraft.moe.quantise import check_int8, int8_options, unpack_options
from fedgraft.moe.settings import EMBEDDED, ModelSettings


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The findings of `examine`."""

    source: str
    """Folder or hub name."""
    commit: str | None
    """Of a hub name."""
    architecture: Architecture
    checkpoint: Checkpoint | None
    """The files of a folder."""
    sites: list[Site]
    """MoE layers of the model without memory; good for names and shapes."""
    needed: Needed
    room: Room
    options: dict[str, Any]
    """What `from_pretrained` is given."""
    notes: tuple[str, ...]
    """What a user should know and need not act on: precision lost, files and parts left out."""


def examine(settings: ModelSettings) -> Plan:
    """Everything `load_base` checks before it reads weights, except that they fit: the two figures for that are in the plan.

    Of a hub name, config.json alone is downloaded.

    Raises:
        ValueError: as `load_base`.
    """
    source = locate(settings.name)
    local = Path(source).is_dir()
    settings.check(local=local)
    checkpoint = inspect_folder(Path(source)) if local else None
    commit = None if local else hub_commit(settings)
    architecture = read_architecture(settings.name, source, settings.hub | {"revision": commit})
    try:
        skeleton, sites = architecture.skeleton(getattr(torch, settings.dtype))
        needed = needed_by(skeleton, sites, settings.quantise)
        if settings.quantise == "bitsandbytes":
            raise ValueError(
                f"quantise bitsandbytes: it packs ordinary linear layers only, so the fused experts, {gib(needed.experts)} of "
                f"{gib(needed.weights)}, would stay as they are; use quantise: int8 with experts: eager"
            )
        packing = unpack_options(architecture, checkpoint)
        if settings.quantise == "int8":
            check_int8(sites)
            packing = packing or int8_options(sites)
    except ValueError as error:
        raise ValueError(f"model.name {settings.name!r}: {error}") from error
    return Plan(
        source=source,
        commit=commit,
        architecture=architecture,
        checkpoint=checkpoint,
        sites=sites,
        needed=needed,
        room=room_for(settings),
        options=settings.options() | {"config": architecture.config, "key_mapping": architecture.key_mapping or None} | packing,
        notes=tuple(_notes(settings, architecture, checkpoint)),
    )


def locate(name: str) -> str:
    """Folder or hub name to load from.

    Raises:
        ValueError: it looks like a path and is not there.
    """
    if name == EMBEDDED:
        return str(resources.files("fedgraft") / "assets" / "base")
    looks_local = name.startswith((".", "/", "~")) or os.sep in name[:1] or name.count("/") > 1
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if looks_local:
        raise ValueError(f"model.name {name!r}: no such folder")
    return name


def _notes(settings: ModelSettings, architecture: Architecture, checkpoint: Checkpoint | None) -> Iterator[str]:
    if checkpoint is not None:
        finer = checkpoint.stored() & ({"float32", "float64"} if settings.dtype != "float32" else {"float64"})
        if finer:
            yield f"weights stored as {min(finer)} are rounded to {settings.dtype}"
        if checkpoint.ignored:
            yield f"not part of the model, not read: {', '.join(checkpoint.ignored)}"
    if architecture.wrapper is not None:
        yield f"{architecture.wrapper}: its text model alone is loaded"
    if architecture.quantisation is not None:
        yield f"packed weights ({architecture.quantisation['quant_method']}) are unpacked to {settings.dtype}"
    if settings.quantise == "int8":
        yield "experts are kept as int8: outputs differ slightly from the unquantised base"
