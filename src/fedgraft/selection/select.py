"""A client's choice of source experts, from its own text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fedgraft import seeds
from fedgraft.data.batches import Batch
from fedgraft.moe.load import Base
from fedgraft.selection.choose import choose, losses, needs_gram
from fedgraft.selection.profile import measure
from fedgraft.selection.settings import SelectionSettings


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What selection found."""

    experts: list[list[int]]
    """Source experts [L][r]."""
    errors: list[list[float]]
    """||R - E_e||^2 / ||R||^2 per layer and expert [L][E]."""
    tokens: int
    """Calibration tokens seen."""


def select_experts(
    base: Base,
    batches: Iterable[Batch],
    settings: SelectionSettings,
    per_layer: int,
    seed: int,
    client: str,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Choice:
    """Measure one profile on the unmodified model and choose `per_layer` experts in every layer; `report` hears (tokens seen, budget).

    Raises:
        ValueError: unknown criterion, or more grafts than experts.
    """
    budget = settings.budget(base.device.type)
    profile = measure(base, batches, budget, gram=needs_gram(settings.criterion, per_layer), progress=lambda seen: report(seen, budget))
    experts = choose(settings.criterion, profile, per_layer, seeds.numpy_rng(seed, "selection", client))
    return Choice(experts=experts, errors=losses(profile), tokens=profile.tokens)
