"""Whole runs on bases that are not simply in memory."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from fedgraft.runner import run
from tests.run.world import World

QUICK = {"federation": {"rounds": 1}, "training": {"steps": 1}}


def digest(world: World, out: Path, **model: object) -> str:
    run(world.recipe(**QUICK, model=model), out=out)
    return (out / "digest.txt").read_text()


def test_what_was_done_to_the_base_is_in_the_record(world, tmp_path):
    digest(world, tmp_path / "run", dtype="bfloat16", device="cpu")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["base_notes"] == ["weights stored as float32 are rounded to bfloat16"]


def test_a_base_offloaded_to_disk_gives_the_same_run_bit_for_bit(world, tmp_path, monkeypatch):
    """Selection, training and evaluation read experts that are not in memory between forwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spread = {"device_map": "auto", "max_memory": {"cpu": "130KiB"}, "offload": str(tmp_path / "offload")}
    assert digest(world, tmp_path / "disk", **spread) == digest(world, tmp_path / "memory")


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao (extra quant) is not installed")
def test_a_base_with_int8_experts_runs_and_repeats_itself(world, tmp_path):
    int8 = {"quantise": "int8", "experts": "eager", "device": "cpu"}
    first = digest(world, tmp_path / "first", **int8)
    assert first == digest(world, tmp_path / "again", **int8)
    assert first != digest(world, tmp_path / "plain")
