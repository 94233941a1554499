"""A client's choice of source experts, from its own text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fedgraft import seeds
from fedgraft.data.batches import Batch
from fedgraft.moe.load import Base
from fedgraft.selection.choose import choose, losses, needs_gram, shares
from fedgraft.selection.profile import Profile, measure
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
    mixture: list[list[tuple[int, float]]]
    """What the graft of each layer starts as a mean of: (expert, share), sum 1; empty for copies."""


def select_experts(
    base: Base,
    batches: Iterable[Batch],
    settings: SelectionSettings,
    per_layer: int,
    seed: int,
    client: str,
    report: Callable[[int, int], None] = lambda done, total: None,
    mixture: int = 1,
    known: list[Profile] | None = None,
) -> Choice:
    """Measure one profile on the unmodified model and choose `per_layer` experts in every layer; `report` hears (tokens seen, budget).

    With a `mixture` above 1 so many are chosen, and the best of them stands for the mixture. Clients that calibrate on the same text give
    the same list as `known`: the first one leaves its profile there, unless that is one by token, which is large.

    Raises:
        ValueError: unknown criterion, or more grafts than experts.
    """
    budget = settings.budget(base.device.type)
    gram = needs_gram(settings.criterion, max(per_layer, mixture))
    if known and not gram:
        profile = known[0]
        report(profile.tokens, budget)
    else:
        profile = measure(base, batches, budget, gram=gram, progress=lambda seen: report(seen, budget))
        if known is not None and not gram:
            known.append(profile)
    return choice_by(profile, settings, per_layer, seed, client, mixture)


def choice_by(profile: Profile, settings: SelectionSettings, per_layer: int, seed: int, client: str, mixture: int = 1) -> Choice:
    """What a profile says; as `select_experts`.

    Raises:
        ValueError: as `select_experts`.
    """
    wanted = max(per_layer, mixture)
    experts = choose(settings.criterion, profile, wanted, seeds.numpy_rng(seed, "selection", client))
    mixed = zip(experts, shares(settings.criterion, profile, experts), strict=True) if mixture > 1 else ()
    return Choice(
        experts=[chosen[:per_layer] for chosen in experts],
        errors=losses(profile),
        tokens=profile.tokens,
        mixture=[list(zip(chosen, share, strict=True)) for chosen, share in mixed],
    )
