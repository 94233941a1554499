"""What every contestant does alike: the work read from the disk, the model with its adapters, a client's local steps.

It needs torch, transformers and peft, and nothing of fedgraft.
"""

from __future__ import annotations

import json
import os
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from marks import WORK, Marks
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

IGNORED = -100
Row = dict[str, list[int]]

torch.set_num_threads(1)
warnings.filterwarnings("ignore")


@dataclass(frozen=True)
class Work:
    """The same for all: rows of each client and round, weights of the mean, settings of training."""

    folder: Path
    rank: int
    alpha: int
    lr: float
    clip: float
    batch_size: int
    rounds: int
    weights: dict[str, int]
    rows: dict[str, list[list[list[Row]]]]
    """client -> [round][step][row]; a row is unpadded `input_ids` and `labels`."""

    @property
    def clients(self) -> list[str]:
        """Their names, in order."""
        return sorted(self.rows)

    def leaves(self) -> dict[str, Tensor]:
        """The adapters that the federation begins with, by PEFT's names."""
        return load_file(self.folder / "leaves.safetensors")


@cache
def work() -> Work:
    """That of the folder which the driver named."""
    folder = Path(os.environ[WORK])
    return Work(folder=folder, **json.loads((folder / "work.json").read_text(encoding="utf-8")))


@cache
def model() -> Any:
    """The base with LoRA on the four projections of attention; loaded once in a process."""
    base = AutoModelForCausalLM.from_pretrained(work().folder / "base", dtype=torch.float32)
    base.config.use_cache = False
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(base, LoraConfig(r=work().rank, lora_alpha=work().alpha, target_modules=targets, task_type="CAUSAL_LM"))


def put(leaves: Mapping[str, Tensor]) -> None:
    """Give the model these adapters."""
    assert leaves.keys() == get_peft_model_state_dict(model()).keys(), "PEFT would leave out what it does not know, without a word"
    set_peft_model_state_dict(model(), dict(leaves))


def taken() -> dict[str, Tensor]:
    """A copy of the model's adapters."""
    return {name: leaf.detach().clone() for name, leaf in get_peft_model_state_dict(model()).items()}


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows as one batch, padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": padded("labels", IGNORED)}


def local_steps(client: str, number: int, marks: Marks) -> None:
    """What a client does in a round, as one writes it in PyTorch: AdamW made anew, clipping, transformers' own loss."""
    network, losses = model().train(), []
    leaves = [leaf for leaf in network.parameters() if leaf.requires_grad]
    optimizer = torch.optim.AdamW(leaves, lr=work().lr, weight_decay=0.0)
    for rows in work().rows[client][number]:
        loss = network(**collate(rows)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(leaves, work().clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        marks.stepped()
    marks.trained(client, number, statistics.fmean(losses))


class Mean:
    """The mean of the clients' adapters by their numbers of rows."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows = 0

    def add(self, client: str, leaves: Mapping[str, Tensor]) -> None:
        """One client's."""
        rows = work().weights[client]
        self.sums = {name: self.sums.get(name, 0) + rows * leaf for name, leaf in leaves.items()}
        self.rows += rows

    def result(self) -> dict[str, Tensor]:
        """Of all that were added."""
        return {name: total / self.rows for name, total in self.sums.items()}
