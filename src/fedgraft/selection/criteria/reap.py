"""The experts whose outputs, weighted by the router, are largest for the tokens they receive (REAP, arXiv 2510.13999)."""

from __future__ import annotations

from torch import Tensor

from fedgraft.selection.profile import Profile


def score(profile: Profile) -> Tensor:
    """S_e = mean of w_e ||E_e(x)||_2 over the tokens with expert e among their top k, 0 where there is none [L, E].

    w_e is the top-k weight as the family computes it, so renormalised where the model does that.
    """
    return profile.strength_LE / profile.count_LE.clamp_min(1)
