"""How much memory a base needs and how much there is, known before any weight is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from fedgraft.moe.architecture import Architecture, read_architecture
from fedgraft.moe.family import Anatomy, list_of_layers
from fedgraft.moe.quantise import expert_parameters, int8_bytes
from fedgraft.moe.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


JOINING = 3
"""A decoder layer takes at most so many times its size while it is read: experts one by one, their projections stacked, and joined."""
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|cannot allocate memory", re.IGNORECASE)


def means_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the machine or a GPU has too little memory."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


@dataclass(frozen=True, kw_only=True)
class Needed:
    """What the weights of a base take in memory; training needs more, for activations and the clients' leaves."""

    parameters: int
    weights: int
    """Bytes of all weights."""
    experts: int
    """Bytes of the fused experts among them."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """Memory that is free now where the base would go."""

    free: dict[str, int]
    """Bytes by device: `cpu`, `cuda:0`, ..."""
    unlimited: bool = False
    """What does not fit goes to disk."""

    @property
    def total(self) -> int:
        """Bytes on all devices."""
        return sum(self.free.values())


def weights_needed(source: PreTrainedConfig | str | Path, dtype: str = "float32", quantise: str = "none") -> Needed:
    """Memory for a base given by its configuration or a folder with its config.json.

    Raises:
        ValueError: not a decoder-only MoE language model.
    """
    if isinstance(source, str | Path):
        architecture = read_architecture(str(source), Path(source))
    else:
        architecture = Architecture(config=source, quantisation=None)
    return needed_by(architecture.skeleton(getattr(torch, dtype)), quantise)


def needed_by(skeleton: Anatomy, quantise: str) -> Needed:
    """Memory of a model built without any; tied weights count once."""
    experts = expert_parameters(skeleton.sites).values()
    as_they_are = sum(parameter.numel() * parameter.element_size() for parameter in experts)
    kept = sum(int8_bytes(parameter) for parameter in experts) if quantise == "int8" else as_they_are
    whole = sum(parameter.numel() * parameter.element_size() for parameter in skeleton.model.parameters())
    count = sum(parameter.numel() for parameter in skeleton.model.parameters())
    return Needed(parameters=count, weights=whole - as_they_are + kept, experts=kept)


def room_for(settings: ModelSettings) -> Room:
    """What is free where `settings` put the base, at most `max_memory`."""
    target = settings.target()
    if settings.device_map is None:
        return Room(free={str(target): _free(target)})
    devices: dict[int | str, torch.device] = {number: torch.device("cuda", number) for number in range(torch.cuda.device_count())}
    devices["cpu"] = torch.device("cpu")
    limits = settings.limits()
    chosen = {key: device for key, device in devices.items() if not limits or key in limits}
    free = {str(device): min(_free(device), limits.get(key, _free(device))) for key, device in chosen.items()}
    return Room(free=free, unlimited=settings.offload is not None)


def check_room(name: str, needed: Needed, room: Room, settings: ModelSettings) -> None:
    """Refuse a base that does not fit, with what it needs and what could be done.

    Raises:
        ValueError: with both figures.
    """
    if needed.weights <= room.total or room.unlimited:
        return
    places = ", ".join(f"{device} {gib(size)}" for device, size in room.free.items())
    remedies = {
        "dtype: bfloat16 (half)": settings.dtype == "float32",
        "quantise: int8 with experts: eager": settings.quantise == "none",
        "device_map: auto (all GPUs and CPU memory)": settings.device_map is None and settings.target().type == "cuda",
        "offload: <folder> (slow)": settings.device_map is not None,
        "a smaller model": True,
    }
    listed = "; ".join(remedy for remedy, applies in remedies.items() if applies)
    raise ValueError(
        f"model.name {name!r}: its weights need {gib(needed.weights)} ({needed.parameters / 1e9:.3g} billion parameters, {settings.dtype})"
        f", and {gib(room.total)} is free ({places}); under model set one of: {listed}"
    )


def layered_bytes(skeleton: Anatomy) -> int:
    """Weights in memory at once when experts are chosen layer by layer: embeddings, and the largest decoder layer while it is put together.

    Raises:
        ValueError: the MoE layers are in several lists.
    """
    layers: Any = skeleton.model.get_submodule(list_of_layers(skeleton.sites))
    sizes = [_bytes(layer) for layer in layers]
    return _bytes(skeleton.model.base_model) - sum(sizes) + JOINING * max(sizes)


def check_layered_room(needed: int, room: Room) -> None:
    """Refuse a base of which not even one decoder layer fits.

    Raises:
        ValueError: with both figures.
    """
    if needed > room.total:
        raise ValueError(f"even layer by layer it needs {gib(needed)}, and {gib(room.total)} is free; take a larger machine")


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 100 else f"{size / 2**20:.2f} MiB"


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
