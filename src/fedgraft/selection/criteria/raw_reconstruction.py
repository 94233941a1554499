"""Reconstruction of the routed output with the model's own top-k weights, not normalised: favours experts of small norm."""

from __future__ import annotations

import torch
from torch import Tensor

from fedgraft.selection.profile import Profile


def score(profile: Profile) -> Tensor:
    """-||R - O_e||_F^2 [L, E], R with the top-k weights as the family computes them (their sum may be below 1)."""
    return 2 * profile.raw_dot_LE - profile.output_sq_LE - profile.raw_full_sq_L[:, None]


def share(profile: Profile) -> Tensor:
    """1 / ||R - O_e||_F^2 [L, E], how much expert e counts in a mixture."""
    return 1 / (-score(profile)).clamp_min(torch.finfo(torch.float64).tiny)
