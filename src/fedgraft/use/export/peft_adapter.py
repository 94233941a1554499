"""A model whose leaves are low-rank terms on linear layers, as a standard PEFT adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fedgraft import files
from fedgraft.grafts.graft import Fitted
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.peft_names import CONFIG, WEIGHTS, layers_by_head, weight_name
from fedgraft.moe.load import Base
from fedgraft.moe.projections import Projection
from fedgraft.moe.settings import EMBEDDED
from fedgraft.tree import Tree
from fedgraft.use.export.subject import Subject, Written
from fedgraft.use.export.weights import stacked
from fedgraft.use.source import SHARED

EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Last names that PEFT takes for the routed experts or the router of families it knows, whatever their full path is."""
MAMBA, REFUSED_THERE = frozenset({"falcon_h1", "nemotron_h"}), frozenset({"out_proj", "conv1d"})
"""Architectures, and last names that PEFT refuses there."""
LOADING = """from peft import PeftModel
model = PeftModel.from_pretrained(base, FOLDER)  # base: the transformers model {base!r}"""


def write(subject: Subject, folder: Path) -> Written:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ValueError: the model has leaves that no PEFT adapter can hold, or layers that PEFT would take for others; says which.
    """
    fitted, base = subject.fitted, subject.base
    _check_leaves(subject, fitted)
    settings, tree = adapter_of(base, fitted, subject.recipe.lora)
    settings |= {"base_model_name_or_path": "" if base.name == EMBEDDED else base.name, "revision": subject.recipe.model.revision}
    save_file(tree, folder / WEIGHTS)
    files.write_json(folder / CONFIG, settings)
    return Written(kind="PEFT adapter (LoRA)", loading=LOADING.format(base=subject.about["base"]))


def adapter_of(base: Base, fitted: Fitted, lora: LoraSettings) -> tuple[dict[str, Any], Tree]:
    """(configuration, weights by their names in PEFT's file) of the low-rank terms, none of which is dense.

    A single pair keeps its bits; where a layer has several terms they are stacked into one pair. PEFT resolves a pattern of paths to last
    names for some families, so every layer of these names gets a pair, a zero one where nothing was trained.

    Raises:
        ValueError: PEFT would take a layer for another.
    """
    heads = layers_by_head(base)
    adapted = [heads[head] for head in fitted.low_rank]
    _check_names(base.model.config.model_type, adapted)
    last = {_last(part) for part in adapted}
    named = {head: part for head, part in heads.items() if _last(part) in last}
    tree: Tree = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for head, part in named.items():
        nothing = torch.zeros(1, part.inputs), torch.zeros(part.outputs, 1), 1.0
        pair = stacked(fitted.low_rank[head], lora.alpha) if head in fitted.low_rank else nothing
        assert pair is not None
        factor_a, factor_b, alpha = pair
        for name, leaf in (("A", factor_a), ("B", factor_b)):
            tree[weight_name(part, name)] = leaf.detach().float().cpu().contiguous().clone()
        if len(factor_a) != lora.rank:
            ranks[re.escape(part.path)] = len(factor_a)
        if alpha != lora.alpha:
            alphas[re.escape(part.path)] = alpha
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "inference_mode": True,
        "target_modules": "|".join(re.escape(part.path) for part in named.values()),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    return settings, tree


def _check_leaves(subject: Subject, fitted: Fitted) -> None:
    dense = next((head for head, terms in fitted.low_rank.items() if len(terms.residual) == 1), None)
    shared = ", or the shared LoRA alone with --client shared" if subject.name != SHARED and subject.loaded.source.has_shared else ""
    problems = (
        (not fitted.low_rank, "it has no low-rank leaves on linear layers", ""),
        (fitted.sides, "its grafted experts and their gates are no LoRA", shared),
        (fitted.router, "the router's rows were trained in full", ""),
        (fitted.experts, "the pairs on routed experts lie one by one, PEFT holds those of a layer in one fused pair", ""),
        (dense, f"{dense}.residual is a dense change, of no low rank", ""),
    )
    for found, why, further in problems:
        if found:
            raise ValueError(f"--as peft: model {subject.name!r} is no PEFT adapter: {why}; export it --as fedgraft or merged{further}")


def _check_names(kind: str, adapted: list[Projection]) -> None:
    for part in adapted:
        if _last(part) in EXPERTS:
            raise ValueError(
                f"--as peft: {part.path}: PEFT takes a layer called {_last(part)} for the routed experts of some architectures, and would "
                "adapt these instead; export it --as fedgraft or merged"
            )
        if kind in MAMBA and _last(part) in REFUSED_THERE:
            raise ValueError(f"--as peft: {part.path}: PEFT adapts no {_last(part)} of a {kind}; export it --as fedgraft or merged")


def _last(part: Projection) -> str:
    return part.path.rpartition(".")[2]
