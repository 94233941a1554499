"""The experts that receive the most routing weight in all."""

from __future__ import annotations

from torch import Tensor

from fedgraft.selection.profile import Profile


def score(profile: Profile) -> Tensor:
    """Mean top-k weight of expert e over all tokens, zero where it is not chosen [L, E]."""
    return profile.mass_LE / profile.tokens
