"""The experts that alone best rebuild the layer's routed output (FLEx, after NAEE); several are chosen greedily."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedgraft.selection.choose import best
from fedgraft.selection.profile import Profile

SUBSETS = True


def select(profile: Profile, r: int, rng: np.random.Generator) -> list[list[int]]:
    """Per layer argmin over e of ||R - O_e||_F^2; each further expert is the one that leaves the smallest ||R - R_S||_F^2.

    R_S(x) is the output of the router masked to the subset S: its probabilities restricted to S and normalised to sum 1 for every token.
    """
    first = best(-profile.error_LE, 1)
    if r == 1:
        return first
    assert profile.token_scores is not None
    assert profile.token_dot is not None
    assert profile.token_gram is not None
    return [
        _extend(start[0], r, scores.double(), dot, gram)
        for start, scores, dot, gram in zip(first, profile.token_scores, profile.token_dot, profile.token_gram, strict=True)
    ]


def _extend(start: int, r: int, score_TE: Tensor, dot_TE: Tensor, gram_TEE: Tensor) -> list[int]:
    """Greedy forward selection from expert `start`, in float64.

    With P = sum of p_i over S, a = sum p_i <R, O_i>, q = ||sum p_i O_i||^2 and c_e = <sum p_i O_i, O_e> per token, the loss of S + e is,
    up to the constant ||R||^2, the sum over tokens of (q + 2 p_e c_e + p_e^2 ||O_e||^2) / (P + p_e)^2 - 2 (a + p_e <R, O_e>) / (P + p_e).
    """
    score_TE = score_TE.clamp_min(torch.finfo(torch.float32).tiny)  # a probability that underflowed must not make 0 / 0
    square_TE = gram_TEE.diagonal(dim1=1, dim2=2).double()
    mass_T1, dot_T1, square_T1 = (torch.zeros(len(score_TE), 1, dtype=torch.float64) for _ in range(3))
    cross_TE = torch.zeros_like(score_TE)
    chosen: list[int] = []
    while len(chosen) < r:
        mass = mass_T1 + score_TE
        squares = square_T1 + 2 * score_TE * cross_TE + score_TE.square() * square_TE
        dots = dot_T1 + score_TE * dot_TE
        loss_E = (squares / mass.square() - 2 * dots / mass).sum(0)
        loss_E[chosen] = torch.inf
        expert = best(-loss_E[None], 1)[0][0] if chosen else start
        mass_T1, dot_T1, square_T1 = mass[:, [expert]], dots[:, [expert]], squares[:, [expert]]
        cross_TE = cross_TE + score_TE[:, [expert]] * gram_TEE[:, expert].double()
        chosen.append(expert)
    return chosen


def share(profile: Profile) -> Tensor:
    """1 / ||R - O_e||_F^2 [L, E]: how much expert e counts in a mixture, which is the inverse-error weighted mean."""
    return 1 / profile.error_LE.clamp_min(torch.finfo(torch.float64).tiny)
