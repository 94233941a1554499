"""Tiny models on disk."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fedgraft import seeds
from tests.conftest import COMMON, CONFIGS

INDEX = "model.safetensors.index.json"


def save(folder: Path, family: str, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """Save a random model of `family` in several shards with its tokenizer; returns the model."""
    with seeds.torch_default(0):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON | CONFIGS.get(family, {}) | config))
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    return model.eval()


def rewrite(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def merged(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder's shards."""
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the folder's weights by one file."""
    for old in (*folder.glob("*.safetensors"), *folder.glob(INDEX)):
        old.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="session")
def olmoe_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A sharded olmoe; not to be changed."""
    folder = tmp_path_factory.mktemp("olmoe")
    save(folder, "olmoe", tiny_tokenizer)
    return folder


@pytest.fixture
def broken(olmoe_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(olmoe_folder, tmp_path / "broken"))


@pytest.fixture
def saved(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., tuple[Path, Any]]:
    """`saved(family, dtype=, **config)`: (folder, model) of a fresh random model."""

    def build(family: str, **options: Any) -> tuple[Path, Any]:
        return tmp_path / family, save(tmp_path / family, family, tiny_tokenizer, **options)

    return build


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
