"""Whole tiny runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.methods.harness import Place, Run, open_run, save

PLACES: dict[str, Place] = {}


@pytest.fixture
def place(tiny_base, tiny_tokenizer, tmp_path_factory) -> Place:
    """A tiny Qwen2-MoE and its clients' files on disk, made once."""
    if "qwen2_moe" not in PLACES:
        PLACES["qwen2_moe"] = save(tiny_base("qwen2_moe").model, tiny_tokenizer, tmp_path_factory.mktemp("place"))
    return PLACES["qwen2_moe"]


@pytest.fixture
def start(place, tmp_path_factory) -> Callable[..., Run]:
    """`start(method, clients=..., lost=None, **recipe sections)`: a run that is opened but not begun."""

    def build(method, lost=None, **options) -> Run:
        return open_run(place.recipe(method, **options), tmp_path_factory.mktemp("run") / method, lost)

    return build
