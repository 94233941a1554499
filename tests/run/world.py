"""A world small enough to run hundreds of times: a tiny MoE on disk, three clients' files, a recipe over both."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fedgraft import seeds
from tests.conftest import COMMON, CONFIGS

CLIENTS = {"bakery": "loaf", "garden": "bean", "harbour": "boat"}
SPLITS = ("train",) * 14 + ("validation",) * 3 + ("test",) * 3


@dataclass(frozen=True)
class World:
    """Where the model and the clients' files lie."""

    model: Path
    data: Path

    def recipe(self, **sections: Any) -> dict[str, Any]:
        """A small recipe; keyword sections are merged over it, None removes one."""
        small: dict[str, Any] = {
            "model": {"name": str(self.model), "threads": 1},
            "data": {"dataset": "jsonl", "path": str(self.data), "partition": "files", "max_length": 96},
            "method": {"name": "flex"},
            "lora": {"rank": 2, "alpha": 4},
            "selection": {"tokens": 256},
            "federation": {"rounds": 3},
            "training": {"steps": 2, "batch_size": 2, "lr": 2e-3, "lr_min": 1e-4},
            "evaluation": {"rows": 2, "batch_size": 2, "generate_rows": 1, "max_new_tokens": 4, "knowledge_tokens": 0},
            "seed": 7,
        }
        for name, section in sections.items():
            small[name] = {**small.get(name, {}), **section} if isinstance(section, dict) else section
        if small["method"]["name"] != "flex":
            small["selection"] = None
        return copy.deepcopy({name: section for name, section in small.items() if section is not None})

    def write(self, path: Path, **sections: Any) -> Path:
        """The recipe as a YAML file."""
        path.write_text(yaml.safe_dump(self.recipe(**sections)), encoding="utf-8")
        return path


def build(folder: Path, tokenizer: PreTrainedTokenizerFast, family: str = "qwen2_moe") -> World:
    """Save model, tokenizer and client files below `folder`."""
    with seeds.torch_default(0):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON | CONFIGS[family]))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "clients").mkdir()
    for name, thing in CLIENTS.items():
        rows = [
            {"instruction": f"How many {thing}s on day {day}?", "output": f"There are {day * len(name)} {thing}s.", "split": split}
            for day, split in enumerate(SPLITS)
        ]
        rows[3]["input"] = f"The {thing} book says so, page after page. " * 4  # too long for a row, so it is cut
        (folder / "clients" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return World(model=folder / "model", data=folder / "clients")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
