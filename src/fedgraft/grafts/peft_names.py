"""What the leaves of a linear layer's pair are called in PEFT's files; one map, for reading and for writing."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fedgraft import address
from fedgraft.moe.family import Anatomy
from fedgraft.moe.projections import Projection

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."


def weight_name(part: Projection, factor: str) -> str:
    """The name of factor `A` or `B` of a layer."""
    return f"{PREFIX}{part.path}.lora_{factor}.weight"


def layers_by_head(anatomy: Anatomy) -> dict[str, Projection]:
    """Head of the addresses of a pair -> its linear layer, for all that can be adapted."""
    return {address.projection(part.layer, part.place, part.name): part for part in anatomy.projections}


def by_pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    """PEFT's rule for `rank_pattern` and `alpha_pattern`: the first pattern that a path ends with, after a dot or as a whole."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)), default)
