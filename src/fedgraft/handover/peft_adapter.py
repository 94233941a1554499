"""Reading a PEFT adapter: LoRA on linear layers, from safetensors alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from fedgraft import files
from fedgraft.grafts.peft_names import CONFIG, PICKLED, PREFIX, WEIGHTS, by_pattern, layers_by_head, weight_name
from fedgraft.moe.family import Anatomy
from fedgraft.tree import Tree

UNCHANGED_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Ways of drawing the first weights that leave the base alone; others (pissa, olora, loftq, corda, ...) write into it."""

VARIANTS = ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config")
"""Settings that make another function of the pairs."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter by our addresses."""

    file: Path
    tree: Tree
    """fp32."""
    scales: dict[str, float]
    """By head: what B A is multiplied by."""
    dropout: float


def read(folder: Path, anatomy: Anatomy) -> Adapter:
    """Read `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ValueError: pickled weights, a damaged file, another kind of adapter than LoRA on linear layers, or a layer that the base lacks.
    """
    settings = _settings(folder / CONFIG)
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = (folder / PICKLED).is_file()
        why = f"{PICKLED} is a pickle, which can run code and is never read; save it again as safetensors" if pickled else "it is missing"
        raise ValueError(f"lora.init: {file}: {why}{' (model.save_pretrained)' if pickled else '; copy it again'}")
    try:
        weights = load_file(file)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"lora.init: {file}: damaged ({error}); copy it again") from None
    tree: Tree = {}
    scales: dict[str, float] = {}
    for head, part in layers_by_head(anatomy).items():
        names = {factor: weight_name(part, factor) for factor in "AB"}
        there = {factor: weights.pop(name) for factor, name in names.items() if name in weights}
        if len(there) == 1:
            raise ValueError(f"lora.init: {file}: holds {names[next(iter(there))]} without its other factor; copy it again")
        if there:
            tree |= {f"{head}.{factor}": leaf.float() for factor, leaf in there.items()}
            scales[head] = _scale(settings, part.path, len(there["A"]))
    if weights:
        raise ValueError(f"lora.init: {file}: {_stray(min(weights), len(weights))}")
    return Adapter(
        file=file,
        tree=tree,
        scales=scales,
        dropout=float(settings.get("lora_dropout") or 0.0),
    )


def base_of(config: Path) -> str:
    """What an `adapter_config.json` says of its base; may be empty.

    Raises:
        ValueError: damaged, or no plain LoRA.
    """
    return str(_settings(config).get("base_model_name_or_path") or "")


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = dict(files.parse_json(files.read_text(path)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"lora.init: {path}: damaged ({error}); copy it again") from None
    refused = (
        (settings.get("peft_type") != "LORA", f"peft_type {settings.get('peft_type')}", "only LORA can be taken over"),
        *((settings.get(key), key, "that is no plain LoRA") for key in VARIANTS),
        (settings.get("bias", "none") != "none", f"bias {settings.get('bias')}", "biases are never trained here"),
        (settings.get("lora_bias"), "lora_bias", "biases are never trained here"),
        (settings.get("fan_in_fan_out"), "fan_in_fan_out", "its layers are no linear ones"),
        (settings.get("modules_to_save"), "modules_to_save", "whole modules are never trained here"),
        (settings.get("trainable_token_indices"), "trainable_token_indices", "embeddings are never trained here"),
        (settings.get("layer_replication"), "layer_replication", "the base is used as it is"),
        (settings.get("target_parameters"), "target_parameters", "routed experts lie in it in one fused pair"),
        (
            settings.get("init_lora_weights", True) not in UNCHANGED_BASE,
            f"init_lora_weights {settings.get('init_lora_weights')}",
            "it was trained on a changed base; convert it to plain LoRA (path_initial_model_for_weight_conversion) and save it again",
        ),
    )
    for found, key, why in refused:
        if found:
            raise ValueError(f"lora.init: {path}: {key}: {why}")
    return settings


def _scale(settings: Mapping[str, Any], path: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (Kalajdzievski 2023)."""
    alpha = by_pattern(settings.get("alpha_pattern") or {}, path, settings.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _stray(name: str, count: int) -> str:
    further = f" and {count - 1} more" if count > 1 else ""
    why = "the base has no such linear layer" if name.startswith(PREFIX) and ".lora_" in name else "that is no factor of a LoRA pair"
    return f"{name}{further}: {why}; it belongs to another base, or adapts what is not adapted here"
