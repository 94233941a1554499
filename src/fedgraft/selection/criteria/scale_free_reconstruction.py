"""Reconstruction of the routed output up to a positive factor, so that an expert's norm does not matter."""

from __future__ import annotations

import torch
from torch import Tensor

from fedgraft.selection.profile import Profile


def score(profile: Profile) -> Tensor:
    """Minus the least ||R - a O_e||_F^2 over a >= 0, that is max(0, <R, O_e>)^2 / ||O_e||_F^2 - ||R||_F^2 [L, E]."""
    tiny = torch.finfo(torch.float64).tiny
    return profile.dot_LE.clamp_min(0).square() / profile.output_sq_LE.clamp_min(tiny) - profile.full_sq_L[:, None]


def share(profile: Profile) -> Tensor:
    """1 / error [L, E], how much expert e counts in a mixture."""
    return 1 / (-score(profile)).clamp_min(torch.finfo(torch.float64).tiny)
