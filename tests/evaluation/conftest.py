"""A client with a grafted tiny model whose leaves all act."""

from __future__ import annotations

import pytest
import torch

from fedgraft import seeds
from fedgraft.address import as_own
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


def by_length(prompts):
    """A share for each row that tells rows of different prompts apart."""
    return torch.tensor([len(ids) % 7 / 7 for ids in prompts])


@pytest.fixture
def blend(client):
    """Two pairs everywhere, none of them zero, that each row blends by `by_length`."""
    with seeds.torch_default(1):
        first, second = ({key: leaf + 0.3 * torch.randn_like(leaf) for key, leaf in client.model.fresh_adapters(0).items()} for _ in "ab")
    return Prediction(tree=first | as_own(second), experts=[], shares=by_length)
