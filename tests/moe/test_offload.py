"""A base spread by accelerate: parts of it are not in memory between forwards, and grafts must not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedgraft.grafts.graft import GraftedModel
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.moe.load import Base, load_base
from fedgraft.moe.settings import ModelSettings
from fedgraft.moe.weights import compute_device, part, plain, stored
from tests.families.twins import twin as family_twin
from tests.grafts.twins import IDS, MASK, random_leaves

EXPERTS = [[3], [5]]


def load(folder: Path, **options: Any) -> Base:
    return load_base(ModelSettings(name=str(folder), **options))


@pytest.fixture
def offloaded(olmoe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    """Embedding in memory, the layers on disk."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base = load(olmoe_folder, device_map="auto", max_memory={"cpu": "130KiB"}, offload=str(tmp_path / "offload"))
    assert set(base.model.hf_device_map.values()) == {"cpu", "disk"}
    assert {site.experts.down_proj.device.type for site in base.sites} == {"meta"}
    return base


def trained(base: Base, checkpointing: bool) -> tuple[Tensor, dict[str, Tensor], str]:
    """Logits with random leaves, the gradient of every leaf, and the digest of the frozen weights."""
    model = GraftedModel(base, LoraSettings(rank=2, dropout=0), GraftSettings())
    fresh = model.fresh_side(EXPERTS, 1) | model.fresh_adapters(1)
    tree = {key: leaf.requires_grad_() for key, leaf in random_leaves(fresh).items()}
    if checkpointing:
        base.model.train()
        base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with model.using(tree, EXPERTS), base.logits_at(MASK.bool()):
        logits = base.model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
        logits.square().mean().backward()
    return logits.detach(), {key: leaf.grad for key, leaf in tree.items() if leaf.grad is not None}, model.frozen_digest()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_offloaded_base_computes_and_trains_as_one_in_memory(offloaded, olmoe_folder, checkpointing):
    there, here = trained(offloaded, checkpointing), trained(load(olmoe_folder, device="cpu"), checkpointing)
    assert torch.equal(there[0], here[0])
    assert there[1].keys() == here[1].keys()
    assert len(there[1]) == 2 * (7 + 6)  # per layer: three pairs and a gate; q, k, v pairs
    assert all(torch.equal(there[1][key], here[1][key]) for key in here[1])
    assert there[2] == here[2]


def test_experts_of_an_offloaded_layer_are_the_stored_ones(offloaded, olmoe_folder):
    whole = load(olmoe_folder, device="cpu")
    for site, twin in zip(offloaded.sites, whole.sites, strict=True):
        mine, other = offloaded.family.expert(site, 4), whole.family.expert(twin, 4)
        assert all(torch.equal(weight, other.projections()[name]) for name, weight in mine.projections().items())


def test_a_map_of_one_device_leaves_everything_in_memory(olmoe_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base = load(olmoe_folder, device_map="auto")
    assert {parameter.device.type for parameter in base.model.parameters()} == {"cpu"}
    assert base.device == torch.device("cpu")


def test_too_little_room_without_a_folder_to_offload_to_is_refused(olmoe_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"0\.05 MiB is free \(cpu 0\.05 MiB\).*offload: <folder>"):
        load(olmoe_folder, device_map="auto", max_memory={"cpu": "50KB"})


def offload(family: str, folder: Path, tokenizer: Any) -> Base:
    family_twin(family).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load(folder, device_map="auto", max_memory={"cpu": "60KiB"}, offload=str(folder / "offload"))


def test_a_router_row_that_passes_through_an_offloaded_norm(tmp_path, tiny_tokenizer, monkeypatch):
    """gemma4 carries the row over to the experts' inputs with the weight of their norm."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base, whole = offload("gemma4_text", tmp_path, tiny_tokenizer), load(tmp_path, device="cpu")
    assert base.sites[0].experts.down_proj.device.type == "meta"
    for site, twin_site in zip(base.sites, whole.sites, strict=True):
        assert torch.equal(base.family.router_row(site, 3), whole.family.router_row(twin_site, 3))


def test_experts_kept_in_a_form_of_their_own_are_not_offloaded(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"experts of dbrx cannot be offloaded; raise model\.max_memory"):
        offload("dbrx", tmp_path, tiny_tokenizer)


class Hook:
    """What is read of an accelerate hook."""

    def __init__(self, device: Any, weights: dict[str, Tensor] | None = None) -> None:
        self.execution_device, self.weights_map = device, weights


def test_leaves_go_where_their_layer_computes(tiny_base):
    """Two devices, of which `meta` stands for the second: layer 1 computes there, layer 0 and the inputs on the CPU."""
    base = tiny_base("olmoe")
    base.sites[1].experts._hf_hook = Hook("meta")
    model = GraftedModel(base, LoraSettings(rank=2), GraftSettings())
    tree = model.placed(model.fresh_side(EXPERTS, 1) | model.fresh_adapters(1) | {"head.A": torch.ones(1)})
    assert {key.startswith("layers.1.") for key, leaf in tree.items() if leaf.device.type == "meta"} == {True}
    assert all(leaf.device.type == "meta" for key, leaf in tree.items() if key.startswith("layers.1."))
    again = model.placed(tree)
    assert all(again[key] is leaf for key, leaf in tree.items())


def test_where_a_parameter_really_is():
    layer = nn.Linear(3, 2)
    assert stored(layer, "weight") is layer.weight
    assert plain(layer.weight) is layer.weight
    assert compute_device(layer) == torch.device("cpu")
    assert part(layer, "weight", 1).data_ptr() == layer.weight[1].data_ptr()
    kept, layer.weight = layer.weight.detach(), nn.Parameter(torch.empty(2, 3, device="meta"))
    layer._hf_hook = Hook("cpu", {"weight": kept})
    assert torch.equal(part(layer, "weight", 1), kept[1])
    nested = Hook(None)
    nested.hooks = [Hook(None), layer._hf_hook]  # type: ignore[attr-defined]
    layer._hf_hook = nested
    assert stored(layer, "weight") is kept
    assert compute_device(layer) == torch.device("cpu")
