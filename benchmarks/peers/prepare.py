"""Write what all contestants work on: a tiny Mixtral, the first adapters, and the token rows of every client, round and step."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

import fedgraft
from fedgraft.data.batches import Batch
from fedgraft.reach import Here
from fedgraft.recipe import check_values
from fedgraft.report.progress import Quiet
from fedgraft.session import Session

EMBEDDED = Path(fedgraft.__file__).with_name("assets") / "base"
RANK, ALPHA, LR, CLIP, STEPS, BATCH_SIZE, MAX_LENGTH = 8, 16, 0.01, 1.0, 4, 4, 128
CATEGORIES = ["classification", "closed_qa", "information_extraction", "summarization"]
TARGETS = ["q", "k", "v", "o"]


def write_base(folder: Path) -> None:
    """A Mixtral of 5 million random parameters (4 layers, 8 experts of which 2 are used) with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED / name, folder / name)


def recipe(base: Path, clients: int, rounds: int) -> dict[str, Any]:
    """fedgraft's FedAvg over these clients; evaluation is kept to the least that there is, since nobody else evaluates."""
    return {
        "model": {"name": str(base), "threads": 1},
        "data": {"dataset": "dolly", "partition": "category", "categories": CATEGORIES[:clients], "max_length": MAX_LENGTH},
        "method": {"name": "fedavg"},
        "lora": {"targets": TARGETS, "rank": RANK, "alpha": ALPHA, "dropout": 0.0},
        "federation": {"rounds": rounds},
        "training": {"steps": STEPS, "batch_size": BATCH_SIZE, "lr": LR, "lr_min": LR, "clip": CLIP},
        "evaluation": {"models": ["shared"], "rows": 1, "generate": False, "knowledge_tokens": 0, "resamples": 0},
        "seed": 0,
    }


def peft_name(address: str) -> str:
    """`layers.3.attention.q.A` as PEFT calls it in a Mixtral."""
    _, layer, _, projection, part = address.split(".")
    return f"base_model.model.model.layers.{layer}.self_attn.{projection}_proj.lora_{part}.weight"


def rows_of(batch: Batch) -> list[dict[str, list[int]]]:
    """Its rows without padding."""
    lengths = batch.mask.sum(dim=1).tolist()
    return [
        {"input_ids": ids[:length].tolist(), "labels": labels[:length].tolist()}
        for ids, labels, length in zip(batch.ids, batch.labels, lengths, strict=True)
    ]


def prepare(folder: Path, clients: int, rounds: int) -> None:
    """Fill an empty folder."""
    write_base(folder / "base")
    values = recipe(folder / "base", clients, rounds)
    with tempfile.TemporaryDirectory() as out, closing(Session(check_values(values, "peers"), Path(out), Quiet())) as session:
        session._open()
        assert isinstance(session.reach, Here)
        holdings, shared = session.reach.holdings, session.server.state.tree("shared")
        rows = {
            name: [[rows_of(batch) for batches in holdings.open(name).batches(number) for batch in batches] for number in range(rounds)]
            for name in holdings.clients
        }
        weights = {name: len(data.train) for name, data in holdings.clients.items()}
    save_file({peft_name(address): leaf.contiguous() for address, leaf in shared.items()}, folder / "leaves.safetensors")
    settings = {"rank": RANK, "alpha": ALPHA, "lr": LR, "clip": CLIP, "batch_size": BATCH_SIZE, "rounds": rounds}
    (folder / "recipe.json").write_text(json.dumps(values), encoding="utf-8")
    (folder / "work.json").write_text(json.dumps({**settings, "weights": weights, "rows": rows}), encoding="utf-8")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), clients=int(sys.argv[2]), rounds=int(sys.argv[3]))
