"""Grafted twins of every architecture as checkpoints: what is read back from the files predicts as the live model."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from fedgraft import files
from fedgraft.grafts.graft import Fitted
from fedgraft.tree import partition
from fedgraft.use.export.checkpoint import read_checkpoint, write_checkpoint
from fedgraft.use.export.peft_adapter import adapter_of
from tests.families.conftest import chosen, grafted, leaves  # noqa: F401  # a fixture
from tests.families.test_contract import SUPPORTED
from tests.families.twins import ids

OWN_WAY = {"dbrx", "jetmoe", "llama4", "llama4_text", "longcat_flash"}
"""Whose experts are called in a way of their own."""


@torch.no_grad()
def logits(model):
    return model(input_ids=ids(), use_cache=False).logits


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_checkpoint_with_grafts_is_the_live_model(grafted, tmp_path, name):  # noqa: F811
    model = grafted(name)
    fitted = model.fitted(leaves(model), chosen(model))
    model.put(fitted)
    live = logits(model.base.model)
    if name in OWN_WAY:
        with pytest.raises(ValueError, match="called in a way of their own"):
            write_checkpoint(model, fitted, tmp_path)
        return
    written = write_checkpoint(model, fitted, tmp_path)
    again = read_checkpoint(tmp_path, written)
    torch.testing.assert_close(logits(again), live, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SUPPORTED)
def test_an_adapter_is_the_live_model(grafted, tmp_path, name):  # noqa: F811
    """PEFT finds exactly the layers that were adapted, whatever it knows of the architecture."""
    model = grafted(name)
    tree, _ = partition(leaves(model), lambda key: ".side." not in key)
    fitted = model.fitted(tree, [])
    model.put(fitted)
    live = logits(model.base.model)
    model.put(Fitted())
    settings, weights = adapter_of(model.base, fitted, model.lora_settings)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    files.write_json(tmp_path / "adapter_config.json", settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is deprecated and will be removed in v6")
        again = PeftModel.from_pretrained(model.base.model, tmp_path).eval()
    torch.testing.assert_close(logits(again), live, rtol=1e-6, atol=1e-6)


def test_all_others_can_be_written():
    assert set(SUPPORTED) > OWN_WAY
