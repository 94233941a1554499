"""Grafted tiny models and their leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedgraft.grafts.graft import GraftedModel
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings

LORA_KEYS = LoraSettings.model_fields.keys()


@pytest.fixture
def tiny_graft(tiny_base) -> Callable[..., GraftedModel]:
    """`tiny_graft(family, **settings of lora and graft)`: a grafted tiny model, rank 4, alpha 6, no dropout unless said."""

    def build(family: str, base: dict[str, Any] | None = None, **settings: Any) -> GraftedModel:
        lora = {"rank": 4, "alpha": 6.0, "dropout": 0.0} | {key: settings.pop(key) for key in LORA_KEYS & settings.keys()}
        return GraftedModel(tiny_base(family, **(base or {})), LoraSettings(**lora), GraftSettings(**settings))

    return build
