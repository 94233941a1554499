"""Runs of the tiny world to be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from fedgraft.data.batches import batches_in_order, encode_all
from fedgraft.data.partition import load_clients
from fedgraft.report.record import Record
from fedgraft.runner import run
from fedgraft.use.loaded import Loaded
from tests.run.conftest import command, world  # noqa: F401  # fixtures
from tests.run.world import World, build

QUICK = {"rows": None, "batch_size": 2, "generate": False, "knowledge_tokens": 0, "experts": False, "resamples": 0}


@pytest.fixture(scope="session")
def trained(
    world: World,  # noqa: F811
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Record]:
    """`trained(method, family="qwen2_moe", **sections)`: a finished run of two rounds, leaves far from their start.

    Made once, not to be changed.
    """
    made: dict[str, Record] = {}
    worlds = {"qwen2_moe": world}

    def make(name: str, family: str = "qwen2_moe", **sections: Any) -> Record:
        key = f"{name} {family} {sections}"
        if family not in worlds:
            worlds[family] = build(tmp_path_factory.mktemp(family), tiny_tokenizer, family)
        if key not in made:
            options = sections.pop("method", {})
            training = {"steps": 2, "batch_size": 2, "lr": 5e-2, "lr_min": 1e-2}
            parts = {"federation": {"rounds": 2}, "training": training, "evaluation": QUICK} | sections
            made[key] = run(worlds[family].recipe(method={"name": name, **options}, **parts), out=tmp_path_factory.mktemp("use") / "run")
        return made[key]

    return make


@torch.no_grad()
def loss_on(loaded: Loaded, client: str, split: str = "test") -> float:
    """Nats per response token of the model in use on a client's rows, in batches as they were evaluated."""
    recipe, base = loaded.source.recipe, loaded.grafted.base
    data = next(data for data in load_clients(recipe.data, recipe.seed) if data.name == client)
    rows, _ = encode_all(getattr(data, split), loaded.tokenizer, recipe.data)
    nats, tokens = np.zeros(len(rows)), np.zeros(len(rows))
    for chosen, batch in batches_in_order(rows, recipe.evaluation.batch_size, base.pad_id):
        with base.logits_at(batch.predicting):
            logits = loaded.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        each = F.cross_entropy(logits.float(), batch.targets, reduction="none").double()
        counts = [int(count) for count in batch.predicting.sum(1)]
        nats[chosen] = [float(part.sum()) for part in each.split(counts)]
        tokens[chosen] = counts
    return float(nats.sum() / tokens.sum())
