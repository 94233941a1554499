"""HetLoRA (Cho et al. 2024, arXiv 2401.06432, section 3): pairs of different ranks, truncated, padded, weighted, pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from fedgraft.aggregation.low_rank_merges import by_product_norm, cut, padded_mean, take
from fedgraft.aggregation.merges import by_examples
from fedgraft.aggregation.replies import Form, as_packed, shapes_of
from fedgraft.aggregation.server import Reply, Server
from fedgraft.bundle import Bundle
from fedgraft.grafts.lora import Shapes
from fedgraft.methods._low_rank import BY_PRODUCT, Ranks, absorb_factors, cut_shapes, ranks_of
from fedgraft.methods.method import Method, Surroundings
from fedgraft.training.client import Client
from fedgraft.training.fit import Fit
from fedgraft.training.local_rules import LocalRule, plain
from fedgraft.training.personal_rules import train

WEIGHTS = {"norm": by_product_norm, "examples": by_examples}


def build(
    ranks: Ranks = None,
    weights: Literal["norm", "examples"] = "norm",
    decay: Annotated[float, Field(gt=0, le=1)] = 0.99,
    strength: NonNegativeFloat = 0.005,
) -> Method:
    """The server's pair has `lora.rank`; a client trains its first rows and columns and sends them back, padded there with zeros.

    Self-pruning: the loss has strength ||B_t|| ||A_t|| over the last part t of a client's ranks, those from decay x rank on; once training
    has made that smaller than it was, summed over all layers, the client drops the part for good. All pairs of a client have one rank (our
    adaptation), and truncation keeps the scale alpha / rank of what is left.

    Args:
        ranks: rank of every client, dealt in turn from a list or by name; empty: `lora.rank` for all. None may be above `lora.rank`.
        weights: `norm`: in proportion to the Frobenius norm of a client's B A; `examples`: to its rows.
        decay: share of the ranks that pruning leaves, gamma of the paper; 1 prunes nothing.
        strength: lambda of the paper.
    """

    def settle(method: Method, surroundings: Surroundings) -> Method:
        dealt = ranks_of(ranks, surroundings)

        def pack(method: Method, server: Server, client: str) -> Bundle:
            rank = _pruned(server).get(client, dealt[client])
            return server.package({"shared": cut(server.state.tree("shared"), rank)})

        return replace(method, pack=pack, merge=padded_mean(surroundings.lora.rank, WEIGHTS[weights]))

    local = plain if decay == 1 else pruning(decay, strength)
    return Method(
        settle=settle, needs_mean=BY_PRODUCT, merges_changes=False, local=local, sent=pruned_once(decay), absorb=absorb_ranks, step=take
    )


def pruning(decay: float, strength: float) -> LocalRule:
    """Plain training with the penalty on the last ranks, which are cut off when they have become smaller."""

    def run(client: Client, start: Mapping[str, Tensor], round_number: int, lr: float) -> Fit:
        """All leaves together, with a penalty on the last ranks; a client drops those once they have become smaller."""
        rank = _rank(start)
        left = _left(rank, decay)

        def penalty(leaves: Mapping[str, Tensor]) -> Tensor:
            return strength * tail(leaves, left)

        result = train(client, start, round_number, lr, penalty=penalty if left < rank else None)
        if left == rank or tail(result.tree, left) >= tail(start, left):
            return result
        return replace(result, tree=cut(result.tree, left), moments={name: {} for name in result.moments})

    return run


def pruned_once(decay: float) -> Form:
    """Leaves of the rank that a client was sent, or of what pruning leaves of it."""

    def form(shapes: Shapes, package: Bundle, reply: Bundle) -> Mapping[str, Shapes]:
        due = as_packed(shapes, package, reply)["shared"]
        pruned = cut_shapes(due, _left(_rank(package.tree("shared")), decay))
        return {"shared": pruned if shapes_of(reply.tree("shared")) == pruned else due}

    return form


def _left(rank: int, decay: float) -> int:
    return max(1, int(decay * rank))


def tail(leaves: Mapping[str, Tensor], left: int) -> Tensor:
    """Sum over pairs of ||B[:, left:]|| ||A[left:]||, Frobenius."""
    pairs = [(leaf[left:], leaves[f"{key[:-2]}.B"][:, left:]) for key, leaf in sorted(leaves.items()) if key.endswith(".A")]
    return torch.stack([torch.linalg.norm(factor_a).cpu() * torch.linalg.norm(factor_b).cpu() for factor_a, factor_b in pairs]).sum()


def absorb_ranks(method: Method, server: Server, replies: Iterator[Reply]) -> None:
    """Merge the replies and note the rank that each of them has by now."""
    ranks = _pruned(server)

    def noted() -> Iterator[Reply]:
        for reply in replies:
            ranks[reply.client] = _rank(reply.bundle.tree("shared"))
            yield reply

    absorb_factors(method, server, noted())
    server.state = Bundle(trees=server.state.trees, facts={**server.state.facts, "ranks": ranks})


def _rank(tree: Mapping[str, Tensor]) -> int:
    return next(len(leaf) for key, leaf in tree.items() if key.endswith(".A"))


def _pruned(server: Server) -> dict[str, int]:
    known: Any = server.state.facts.get("ranks", {})
    return dict(known)
