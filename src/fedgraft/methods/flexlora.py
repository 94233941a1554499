"""FlexLoRA (Bai et al. 2024, arXiv 2402.11505, section 3): the mean of the clients' B A, cut by SVD to each client's rank."""

from __future__ import annotations

from dataclasses import replace

from fedgraft.aggregation.low_rank_merges import refactorised, take
from fedgraft.methods._low_rank import BY_PRODUCT, Ranks, absorb_factors, pack_cut, ranks_of
from fedgraft.methods.method import Method, Surroundings


def build(ranks: Ranks = None) -> Method:
    """Clients train and send pairs of their own rank; the server keeps the mean as a pair of `lora.rank`, largest singular values first.

    It is the mean itself once `lora.rank` reaches the sum of the ranks or the layer's smaller side. The split of the decomposition into A
    (singular vectors) and B (with the values) is our choice: it leaves A at the size it has at the start.

    Args:
        ranks: rank of every client, dealt in turn from a list or by name; empty: `lora.rank` for all. None may be above `lora.rank`.
    """

    def settle(method: Method, surroundings: Surroundings) -> Method:
        return replace(method, pack=pack_cut(ranks_of(ranks, surroundings)), merge=refactorised(surroundings.lora.rank))

    return Method(settle=settle, needs_mean=BY_PRODUCT, merges_changes=False, absorb=absorb_factors, step=take)
