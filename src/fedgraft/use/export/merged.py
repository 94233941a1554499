"""A checkpoint that holds everything, and that is loaded again and compared before it counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgraft import seeds
from fedgraft.use.export.checkpoint import read_checkpoint, write_checkpoint
from fedgraft.use.export.subject import Subject, Written

LOADING = """from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(FOLDER{further})"""
PROBE = (4, 48)
"""Rows and tokens of the text that the reloaded checkpoint is compared on."""


def write(subject: Subject, folder: Path) -> Written:
    """Write the checkpoint, load it again and compare its logits with those of the live model.

    Raises:
        ValueError: the base is quantised, spread or of a family that no modelling file can be written for, or the logits differ.
    """
    base, settings = subject.base, subject.recipe.model
    if settings.quantise != "none" or settings.device_map is not None:
        raise ValueError(
            "--as merged: writes into the weights, which are quantised or spread here; load them whole: "
            "--set model.quantise=none --set model.device_map=null"
        )
    fitted, ids = subject.fitted, _probe(subject)
    with subject.loaded.using(subject.name) as model:
        before = _logits(model, ids)
    base.tokenizer.save_pretrained(folder)
    written = write_checkpoint(subject.loaded.grafted, fitted, folder)
    exact, notes = base.model.dtype == torch.float32, [written.note] if written.note else []
    if written.code:
        notes.append(f"It needs trust_remote_code, since it can't be a Qwen2-MoE: {written.code}.")
    if not exact:
        notes.append(f"Its weights are rounded to {settings.dtype}, the base's precision, so its logits differ by that from the live ones.")
    base.model.to("meta")  # one of the two in memory at a time
    difference = _compare(_logits(read_checkpoint(folder, written).to(ids.device), ids), before, exact)
    loading = LOADING.format(further=", trust_remote_code=True" if written.code else "")
    return Written(kind=written.kind, loading=loading, notes=notes, difference=difference)


def _probe(subject: Subject) -> Tensor:
    """Random tokens [rows, tokens]."""
    rows, tokens = PROBE
    length = min(tokens, subject.loaded.longest or tokens)
    vocabulary = int(subject.base.model.config.get_text_config().vocab_size)
    return torch.randint(vocabulary, (rows, length), generator=seeds.torch_rng(0, "probe")).to(subject.base.device)


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float().cpu()


def _compare(after: Tensor, before: Tensor, exact: bool) -> float:
    """The largest difference of a logit.

    Raises:
        ValueError: it is more than rounding explains. Rounding may send single tokens, whose choice was next to a tie, to other experts:
            in fp32 one in ten may differ by more than a thousandth of the logits' deviation, in 16 bits all by a tenth on average.
    """
    apart, scale = (after - before).abs(), float(before.std())
    worst, mean = float(apart.max()), float(apart.mean())
    elsewhere = float((apart.amax(-1) > 1e-3 * scale).float().mean())
    if not math.isfinite(worst) or (elsewhere > 0.1 or mean > 0.01 * scale if exact else mean > 0.1 * scale):
        raise ValueError(
            f"--as merged: the checkpoint's logits differ by up to {worst:.3g} (mean {mean:.3g}) from the live model's, so it is another "
            "model, and nothing was written; export it --as fedgraft"
        )
    return worst
