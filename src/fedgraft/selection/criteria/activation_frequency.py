"""The experts that the router chooses for the most tokens."""

from __future__ import annotations

from torch import Tensor

from fedgraft.selection.profile import Profile


def score(profile: Profile) -> Tensor:
    """Share of the tokens with expert e among their top k [L, E]."""
    return profile.count_LE / profile.tokens
