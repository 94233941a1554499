"""A client with a grafted tiny model whose leaves all act."""

from __future__ import annotations

import pytest
import torch

from fedgraft import seeds
from fedgraft.data.example import Example
from fedgraft.data.partition import ClientData
from fedgraft.data.settings import DataSettings
from fedgraft.grafts.graft import GraftedModel
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.methods.method import Prediction
from fedgraft.selection.settings import SelectionSettings
from fedgraft.training.client import Client
from fedgraft.training.settings import TrainingSettings

WORDS = ["amber", "birch", "cedar", "dune", "ember", "frost", "grove", "heath", "islet", "jetty", "knoll", "ledge"]


def examples(count: int, start: int = 0) -> list[Example]:
    """Rows of different lengths; the sixth has a context that does not fit."""
    return [
        Example(
            id=str(number),
            category="made up",
            instruction=" ".join(WORDS[: 1 + number % 5]) + "?",
            context="page after page " * 20 if number == 5 else "",
            response=" ".join(WORDS[number % 7 : number % 7 + 1 + (3 * number) % 4]),
        )
        for number in range(start, start + count)
    ]


@pytest.fixture
def client(tiny_base):
    model = GraftedModel(tiny_base("qwen2_moe"), LoraSettings(rank=2, alpha=4, dropout=0.5), GraftSettings())
    return Client(
        data=ClientData("ada", examples(4), examples(3, 10), examples(7)),
        model=model,
        seed=0,
        data_settings=DataSettings(max_length=96),
        training=TrainingSettings(),
        selection=SelectionSettings(),
    )


@pytest.fixture
def prediction(client):
    """Leaves of a graft of expert 3 and 5, none of them zero."""
    experts = [[3], [5]]
    with seeds.torch_default(1):
        fresh = client.model.fresh_adapters(0) | client.model.fresh_side(experts, 0)
        tree = {key: leaf + 0.2 * torch.randn_like(leaf) for key, leaf in fresh.items()}
    return Prediction(tree=tree, experts=experts)
