"""Experts drawn at random, as a control."""

from __future__ import annotations

import numpy as np

from fedgraft.selection.profile import Profile


def select(profile: Profile, r: int, rng: np.random.Generator) -> list[list[int]]:
    """R different experts of each layer, uniformly."""
    layers, experts = profile.output_sq_LE.shape
    return [rng.choice(experts, size=r, replace=False).tolist() for _ in range(layers)]
