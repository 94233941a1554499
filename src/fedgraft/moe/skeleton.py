"""A model without weights: its anatomy from the configuration alone, on the meta device, in seconds whatever its size."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from fedgraft.moe.architecture import Architecture, read_architecture
from fedgraft.moe.family import Anatomy
from fedgraft.moe.hub import hub_config
from fedgraft.moe.plan import locate
from fedgraft.moe.settings import ModelSettings


def skeleton(settings: ModelSettings) -> Anatomy:
    """The anatomy of a model whose parameters have shapes and no memory.

    `name` may also be a config.json; of a hub name, config.json alone is fetched. A quantised checkpoint counts as unpacked to `dtype`.

    Raises:
        ValueError: no configuration there, or none of a decoder-only MoE language model that transformers knows.
    """
    architecture = _architecture(settings)
    try:
        anatomy = architecture.skeleton(getattr(torch, settings.dtype))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        kind = architecture.config.model_type
        raise ValueError(
            f"model.name {settings.name!r}: its configuration makes no {kind} model that can be grafted on ({error})"
        ) from error
    anatomy.model.requires_grad_(False).eval()
    return anatomy


def is_local(settings: ModelSettings) -> bool:
    """Whether the model is embedded or a folder or file here.

    Raises:
        ValueError: it looks like a path and is not there.
    """
    return Path(settings.name).is_file() or locate(settings.name) is not None


def _architecture(settings: ModelSettings) -> Architecture:
    path = Path(settings.name)
    if not path.is_file():
        return read_architecture(settings.name, locate(settings.name) or hub_config(settings))
    with tempfile.TemporaryDirectory() as folder:  # a configuration of any name, where transformers looks for it
        shutil.copy(path, Path(folder) / "config.json")
        return read_architecture(settings.name, Path(folder))
