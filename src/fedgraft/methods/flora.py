"""FLoRA (Wang et al. 2024, arXiv 2409.05976, section 3): the clients' pairs are stacked, never averaged; every round starts new ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedgraft import seeds
from fedgraft.address import is_residual
from fedgraft.aggregation.low_rank_merges import cut, pile, stacked
from fedgraft.aggregation.server import Ask, Server
from fedgraft.bundle import Bundle
from fedgraft.grafts.lora import Shapes
from fedgraft.methods._linear import on_linear_layers
from fedgraft.methods._low_rank import BY_PRODUCT, Ranks, absorb_factors, cut_shapes, dense_residuals, ranks_of
from fedgraft.methods.method import Method, Surroundings, train_round
from fedgraft.training.client import Client
from fedgraft.training.personal_rules import around
from fedgraft.tree import combine


def build(ranks: Ranks = None) -> Method:
    """A client draws a new pair of its rank each round and sends it trained; what all rounds have added up to is a frozen residual.

    The paper merges the stack into every client's base; here it is a shared leaf, so the base stays as it is. It travels down as a stacked
    pair until that has as many entries as the layer itself, and as a dense matrix from there on.

    Args:
        ranks: rank of every client, dealt in turn from a list or by name; empty: `lora.rank` for all. None may be above `lora.rank`.
    """

    def settle(method: Method, surroundings: Surroundings) -> Method:
        if surroundings.lora.init is not None:
            raise ValueError("lora.init: this method draws new pairs in every round, so it starts from none; remove it")
        dealt = ranks_of(ranks, surroundings)

        def pack(method: Method, server: Server, client: str) -> Bundle:
            return server.package({"shared": server.state.tree("shared")}, rank=dealt[client])

        return replace(method, pack=pack, merge=stacked(surroundings.lora.alpha))

    return Method(
        settle=on_linear_layers(settle),
        needs_mean=BY_PRODUCT,
        merges_changes=False,
        down=dense_residuals,
        sent=new_pairs,
        open=open_empty,
        local=around(is_residual),
        absorb=absorb_factors,
        step=pile,
        train=train_anew,
    )


def new_pairs(shapes: Shapes, package: Bundle, reply: Bundle) -> Mapping[str, Shapes]:
    """Pairs of the client's rank, whatever the residual that it was sent."""
    rank = package.facts["rank"]
    assert isinstance(rank, int)
    return {"shared": cut_shapes(shapes, rank)}


def open_empty(method: Method, server: Server, ask: Ask) -> None:
    """No residual before the first round."""
    server.state = Bundle(trees={"shared": {}})


def train_anew(method: Method, client: Client, package: Bundle) -> Bundle:
    """A round from a new pair, drawn from seed, round and client, beside the residual so far."""
    round_number, rank = package.facts["round"], package.facts["rank"]
    assert isinstance(round_number, int)
    assert isinstance(rank, int)
    drawn = client.model.fresh_adapters(seeds.derive(client.seed, "pair", round_number, client.name))
    shared = combine(package.tree("shared"), cut(drawn, rank))
    return train_round(method, client, Bundle(trees={"shared": shared}, facts=package.facts))
