"""All that is known of a base, and decided about it, before its weights are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fedgraft.moe.architecture import Architecture, read_architecture
from fedgraft.moe.checkpoint import Checkpoint, inspect_folder
from fedgraft.moe.family import Anatomy
from fedgraft.moe.hub import hub_config
from fedgraft.moe.memory import Needed, Room, gib, needed_by, room_for
from fedgraft.moe.quantise import check_int8, int8_options, unpack_options
from fedgraft.moe.settings import EMBEDDED, ModelSettings


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The findings of `examine`."""

    folder: Path
    """Where its config.json is, and of a local folder everything else."""
    commit: str | None
    """Of a hub name, whose weights may have to be downloaded yet."""
    architecture: Architecture
    checkpoint: Checkpoint | None
    """The files of a folder."""
    skeleton: Anatomy
    """The model without memory; good for names and shapes."""
    needed: Needed
    room: Room
    options: dict[str, Any]
    """What `from_pretrained` is given."""
    notes: tuple[str, ...]
    """What a user should know and need not act on: parts left out, quantisation."""


def examine(settings: ModelSettings) -> Plan:
    """Everything `load_base` checks before it reads weights, except that they fit: the two figures for that are in the plan.

    Of a hub name, config.json alone is downloaded.

    Raises:
        ValueError: as `load_base`.
    """
    local = locate(settings.name)
    settings.check(local=local is not None)
    checkpoint = None if local is None else inspect_folder(local)
    folder = hub_config(settings) if local is None else local
    architecture = read_architecture(settings.name, folder)
    try:
        skeleton = architecture.skeleton(getattr(torch, settings.dtype))
        needed = needed_by(skeleton, settings.quantise)
        if settings.quantise == "bitsandbytes":
            raise ValueError(
                f"quantise bitsandbytes: it packs ordinary linear layers only, so the fused experts, {gib(needed.experts)} of "
                f"{gib(needed.weights)}, would stay as they are; use quantise: int8 with experts: eager"
            )
        packing = unpack_options(architecture)
        if settings.quantise == "int8":
            check_int8(skeleton)
            packing = packing or int8_options(skeleton.sites)
    except ValueError as error:
        raise ValueError(f"model.name {settings.name!r}: {error}") from error
    options = settings.options() | {"config": architecture.config, "key_mapping": architecture.key_mapping or None} | packing
    if not skeleton.model._can_set_experts_implementation():
        del options["experts_implementation"]
    return Plan(
        folder=folder,
        commit=folder.name if local is None else None,
        architecture=architecture,
        checkpoint=checkpoint,
        skeleton=skeleton,
        needed=needed,
        room=room_for(settings),
        options=options,
        notes=tuple(_notes(settings, architecture)),
    )


def locate(name: str) -> Path | None:
    """The folder to load from; None for a hub name.

    Raises:
        ValueError: it looks like a path and is not there.
    """
    if name == EMBEDDED:
        return Path(str(resources.files("fedgraft") / "assets" / "base"))
    looks_local = name.startswith((".", "/", "~")) or os.sep in name[:1] or name.count("/") > 1
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if looks_local:
        raise ValueError(f"model.name {name!r}: no such folder")
    return None


def file_notes(settings: ModelSettings, checkpoint: Checkpoint) -> Iterator[str]:
    """What of the files is changed or left out."""
    finer = checkpoint.stored() & ({"float32", "float64"} if settings.dtype != "float32" else {"float64"})
    if finer:
        yield f"weights stored as {min(finer)} are rounded to {settings.dtype}"
    if checkpoint.ignored:
        yield f"not part of the model, not read: {', '.join(checkpoint.ignored)}"


def _notes(settings: ModelSettings, architecture: Architecture) -> Iterator[str]:
    if architecture.wrapper is not None:
        yield f"{architecture.wrapper}: its text model alone is loaded"
    if architecture.quantisation is not None:
        yield f"packed weights ({architecture.quantisation['quant_method']}) are unpacked to {settings.dtype}"
    if settings.quantise == "int8":
        yield "experts are kept as int8: outputs differ slightly from the unquantised base"
