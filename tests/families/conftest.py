"""Grafted twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedgraft.grafts.graft import Experts, GraftedModel
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.moe.family import router_matrix
from fedgraft.moe.load import prepare
from fedgraft.tree import Tree
from tests.families.twins import twin

ALPHA, RANK = 6.0, 2
CHOSEN = 5
"""The source expert of every graft."""
FEW_TARGETS = {"jetmoe": ("k", "v")}
"""Families that lack one of the default targets, and what they are given: JetMoE's q and o are experts of its attention."""


@pytest.fixture
def grafted() -> Callable[..., GraftedModel]:
    """`grafted(model_type, experts=None, targets=None, **graft settings)`: a twin with places for leaves, rank 2, no dropout."""

    def build(name: str, experts: str | None = None, targets: tuple[str, ...] | None = None, **graft: Any) -> GraftedModel:
        lora = LoraSettings(rank=RANK, alpha=ALPHA, dropout=0.0, targets=targets or FEW_TARGETS.get(name, ("q", "k", "v")))
        settings = {"gate_start": "low"} | graft
        return GraftedModel(prepare(name, twin(name, experts), None, name), lora, GraftSettings(**settings))

    return build


def chosen(model: GraftedModel) -> Experts:
    """One graft per layer, of expert `CHOSEN`."""
    return [[CHOSEN] for _ in model.base.sites]


def leaves(model: GraftedModel, scale: float = 0.2) -> Tree:
    """All leaves of a client's model, none of them zero."""
    rng = torch.Generator().manual_seed(1)
    fresh = model.fresh_adapters(0) | model.fresh_side(chosen(model), 0)
    return {key: leaf + scale * torch.randn(leaf.shape, generator=rng) for key, leaf in fresh.items()}


def merge_by_hand(model: Any, base: Any, tree: Tree) -> None:
    """Write adapter leaves into the plain weights of `model`, whose modules `base` (an anatomy of it) names."""
    scale = ALPHA / RANK
    for part in base.projections:
        head = f"layers.{part.layer}.{part.place}.{part.name}"
        if f"{head}.A" in tree:
            model.get_submodule(part.path).weight.data += scale * tree[f"{head}.B"] @ tree[f"{head}.A"]
    for site in base.sites:
        if f"layers.{site.layer}.router.weight" in tree:
            router_matrix(site).data.copy_(tree[f"layers.{site.layer}.router.weight"])
        for number in range(site.num_experts):
            for name, weight in base.family.expert(site, number).projections().items():  # views: adding changes the model
                head = f"layers.{site.layer}.expert.{number}.{name}"
                if f"{head}.A" in tree:
                    weight.add_(scale * tree[f"{head}.B"] @ tree[f"{head}.A"])
