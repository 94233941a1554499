"""The estimate of activations, against what autograd really keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedgraft.account.memory import SLACK, Workload, workload
from fedgraft.account.take import take_account
from fedgraft.grafts.graft import GraftedModel
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.methods.flex import build
from fedgraft.moe.load import Base, load_base
from fedgraft.moe.settings import ModelSettings
from fedgraft.training.settings import TrainingSettings


@pytest.fixture
def base() -> Base:
    return load_base(ModelSettings(threads=1))


@pytest.mark.parametrize(("rows", "length"), [(1, 64), (4, 128)])
def test_activations_are_near_what_autograd_keeps(base: Base, rows: int, length: int) -> None:
    lora, graft = LoraSettings(rank=8), GraftSettings()
    work = Workload(length=length, rows=rows)
    account = take_account(base, build(), lora, graft, work)
    model = GraftedModel(base, lora, graft)
    experts = [[0]] * len(base.sites)
    tree = {key: leaf.requires_grad_() for key, leaf in (model.fresh_adapters(0) | model.fresh_side(experts, 0)).items()}
    parameters = {part.untyped_storage().data_ptr() for part in [*base.model.parameters(), *tree.values()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with model.using(tree, experts), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = base.model(input_ids=torch.randint(5, 8000, (rows, length)), use_cache=False).logits
    assert logits.requires_grad
    counted = account.memory.activations / SLACK
    assert 0.5 < counted / sum(kept.values()) < 2


def test_what_is_stored_is_exact(counted: Callable[..., object]) -> None:
    account = counted("olmoe-1b-7b-0924")
    assert account.memory.weights == 2 * account.parameters  # type: ignore[attr-defined]
    assert account.memory.leaves == 4 * 5 * account.trained  # type: ignore[attr-defined]
    assert account.memory.total == account.memory.weights + account.memory.training  # type: ignore[attr-defined]


def test_checkpointing_and_accumulation_lower_memory_and_autocast_adds_casts(base: Base) -> None:
    def memory(**training: object) -> tuple[int, int]:
        work = workload(TrainingSettings(batch_size=16, **training), length=256, dtype="float32")  # type: ignore[arg-type]
        found = take_account(base, build(), LoraSettings(rank=8), GraftSettings(), work).memory
        return found.activations, found.casts

    plain, _ = memory()
    assert memory(accumulation=4)[0] == pytest.approx(plain / 4, rel=1e-6)
    assert memory(checkpointing=True)[0] < plain / 2
    half, casts = memory(precision="bf16")
    assert half < plain
    matrices = sum(part.numel() for part in base.model.parameters() if part.ndim > 1)
    assert casts == pytest.approx(2 * matrices, rel=0.01)  # the tied embedding is the head
