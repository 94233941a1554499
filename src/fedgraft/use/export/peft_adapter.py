"""A model whose leaves are low-rank terms on linear layers, as a standard PEFT adapter."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from fedgraft import address, files
from fedgraft.grafts.graft import Fitted
from fedgraft.moe.projections import Projection
from fedgraft.moe.settings import EMBEDDED
from fedgraft.tree import Tree
from fedgraft.use.export.subject import Subject, Written
from fedgraft.use.export.weights import stacked

EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Last names that PEFT takes for the routed experts or the router of families it knows, whatever their full path is."""
LOADING = """from peft import PeftModel
model = PeftModel.from_pretrained(base, FOLDER)  # base: the transformers model {base!r}"""


def write(subject: Subject, folder: Path) -> Written:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    A single pair keeps its bits; where a layer has several terms they are stacked into one pair. PEFT resolves a pattern of paths to last
    names for some families, so every layer of these names gets a pair, a zero one where nothing was trained.

    Raises:
        ValueError: the model has leaves that no PEFT adapter can hold, or layers that PEFT would take for others; says which.
    """
    fitted, lora = subject.fitted, subject.recipe.lora
    _check_leaves(subject, fitted)
    heads = {address.projection(part.layer, part.place, part.name): part for part in subject.base.projections}
    adapted = [heads[head] for head in fitted.low_rank]
    _check_names(adapted)
    last = {_last(part) for part in adapted}
    tree: Tree = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    named = [(head, part) for head, part in heads.items() if _last(part) in last]
    for head, part in named:
        if head in fitted.low_rank:
            pair = stacked(fitted.low_rank[head], lora.alpha)
            assert pair is not None
        else:
            pair = torch.zeros(1, part.inputs), torch.zeros(part.outputs, 1), 1.0
        factor_a, factor_b, alpha = pair
        tree |= {f"base_model.model.{part.path}.lora_{name}.weight": leaf for name, leaf in (("A", factor_a), ("B", factor_b))}
        if len(factor_a) != lora.rank:
            ranks[re.escape(part.path)] = len(factor_a)
        if alpha != lora.alpha:
            alphas[re.escape(part.path)] = alpha
    save_file({key: leaf.detach().float().cpu().contiguous().clone() for key, leaf in tree.items()}, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "" if subject.base.name == EMBEDDED else subject.base.name,
        "revision": subject.recipe.model.revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "inference_mode": True,
        "target_modules": "|".join(re.escape(part.path) for _, part in named),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    files.write_json(folder / "adapter_config.json", settings)
    return Written(kind="PEFT adapter (LoRA)", loading=LOADING.format(base=subject.base.name))


def _check_leaves(subject: Subject, fitted: Fitted) -> None:
    dense = next((head for head, terms in fitted.low_rank.items() if len(terms.residual) == 1), None)
    problems = (
        (not fitted.low_rank, "it has no low-rank leaves on linear layers"),
        (fitted.sides, "its grafted experts and their gates are no LoRA"),
        (fitted.router, "the router's rows were trained in full"),
        (fitted.experts, "the pairs on routed experts lie one by one, PEFT holds those of a layer in one fused pair"),
        (dense, f"{dense}.residual is a dense change, of no low rank"),
    )
    shared = " (of the shared LoRA alone it can: --client shared)" if subject.name != "shared" and subject.loaded.source.has_shared else ""
    for found, why in problems:
        if found:
            raise ValueError(f"--as peft: model {subject.name!r} is no PEFT adapter: {why}; export it --as fedgraft or merged{shared}")


def _check_names(adapted: list[Projection]) -> None:
    for part in adapted:
        if _last(part) in EXPERTS:
            raise ValueError(
                f"{part.path}: PEFT takes a layer called {_last(part)} for the routed experts of some architectures, and would adapt these "
                "instead; export it --as fedgraft or merged"
            )


def _last(part: Projection) -> str:
    return part.path.rpartition(".")[2]
