"""Grafted twins of every architecture as checkpoints: what is read back from the files predicts as the live model."""

from __future__ import annotations

import pytest
import torch

from fedgraft.use.export.checkpoint import read_checkpoint, write_checkpoint
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


def test_all_others_can_be_written():
    assert set(SUPPORTED) > OWN_WAY
