"""Full-size models without weights, from their public configurations."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedgraft.account.memory import Workload
from fedgraft.account.take import Account, take_account
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.methods.flex import build
from fedgraft.methods.method import Method
from fedgraft.moe.family import Anatomy
from fedgraft.moe.settings import ModelSettings
from fedgraft.moe.skeleton import skeleton

CONFIGS = Path(__file__).parent / "configs"


@cache
def full_size(name: str) -> Anatomy:
    return skeleton(ModelSettings(name=str(CONFIGS / f"{name}.json"), dtype="bfloat16"))


@pytest.fixture(scope="session")
def counted() -> Callable[..., Account]:
    """`counted(name or anatomy, method=, rank=, targets=, length=, **graft)`: the account of a model in bfloat16."""

    def count(
        model: str | Anatomy, *, method: Method | None = None, rank: int = 32, targets: str = "q k v", length: int = 512, **graft: Any
    ) -> Account:
        anatomy = full_size(model) if isinstance(model, str) else model
        lora = LoraSettings(rank=rank, targets=tuple(targets.split()))
        work = Workload(length=length, rows=4, dtype="bfloat16")
        return take_account(anatomy, method or build(), lora, GraftSettings(**graft), work)

    return count
