"""Choosing a client's experts: a criterion applied to its profile."""

from __future__ import annotations

import numpy as np
import torch

from fedgraft import plugins
from fedgraft.selection.profile import Profile


def needs_gram(criterion: str, r: int) -> bool:
    """Whether choosing r experts per layer by this criterion takes a profile measured with `gram=True`.

    A criterion whose r experts are chosen jointly says so by `SUBSETS = True`.

    Raises:
        ValueError: no such criterion.
    """
    return r > 1 and bool(getattr(plugins.load("criterion", criterion), "SUBSETS", False))


def choose(criterion: str, profile: Profile, r: int, rng: np.random.Generator) -> list[list[int]]:
    """The r experts of every MoE layer, best first, ties to the lowest index.

    Args:
        criterion: name of a file in `selection/criteria/`.
        profile: the client's own.
        r: experts per layer.
        rng: the stream of criteria that draw.

    Raises:
        ValueError: no such criterion, r outside 1..E, or the criterion chooses r > 1 jointly and the profile was measured without `gram`.
    """
    module = plugins.load("criterion", criterion)
    layers, experts = profile.output_sq_LE.shape
    if not 1 <= r <= experts:
        raise ValueError(f"{r} experts per layer were asked for; the model's layers have {experts} (1 to {experts} can be chosen)")
    if needs_gram(criterion, r) and profile.token_gram is None:
        raise ValueError(f"criterion {criterion!r} chooses {r} experts jointly: measure the profile with gram=True")
    if hasattr(module, "select"):
        chosen: list[list[int]] = module.select(profile, r, rng)
        assert len(chosen) == layers
        return chosen
    return best(module.score(profile), r)


def shares(criterion: str, profile: Profile, chosen: list[list[int]]) -> list[list[float]]:
    """How much each of the chosen experts [L][m] counts in a mixture of them, sum 1 per layer.

    In proportion to the criterion's `share(profile)` [L, E] (positive), where it has none to its score, where it has neither to 1.
    """
    module = plugins.load("criterion", criterion)
    counts = getattr(module, "share", getattr(module, "score", lambda profile: torch.ones_like(profile.output_sq_LE)))
    weight = counts(profile).gather(1, torch.tensor(chosen)).clamp_min(torch.finfo(torch.float64).tiny)
    result: list[list[float]] = (weight / weight.sum(-1, keepdim=True)).tolist()
    return result


def best(score_LE: torch.Tensor, r: int) -> list[list[int]]:
    """The r highest scores of each row, best first, ties to the lowest index."""
    order: list[list[int]] = score_LE.sort(dim=-1, descending=True, stable=True).indices[:, :r].tolist()
    return order


def losses(profile: Profile) -> list[list[float]]:
    """Relative reconstruction error ||R - O_e||_F^2 / ||R||_F^2 of every expert [L][E], for the record; 0 is exact."""
    tiny = torch.finfo(torch.float64).tiny
    relative: list[list[float]] = (profile.error_LE.clamp_min(0) / profile.full_sq_L[:, None].clamp_min(tiny)).tolist()
    return relative
