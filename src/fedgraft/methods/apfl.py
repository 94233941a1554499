"""APFL (Deng et al. 2020, arXiv 2003.13461, Algorithm 1): a personal model that is a blend of the shared and an own one."""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat

from fedgraft.address import MIX
from fedgraft.methods._linear import on_linear_layers
from fedgraft.methods._personal import twice, with_second
from fedgraft.methods.method import Method
from fedgraft.settings import Share
from fedgraft.training.client import Client
from fedgraft.training.personal_rules import blended, own_leaves
from fedgraft.tree import Tree


def build(mix: Share = 0.5, mix_lr: NonNegativeFloat = 0.0) -> Method:
    """The shared path is FedAvg's. A client predicts with mix v + (1 - mix) w and trains v by the loss of that blend.

    v is a second pair at every projection; blended are the changes of the weights, mix B_v A_v + (1 - mix) B_w A_w, where the paper blends
    parameters (our adaptation: factors cannot be blended one by one). v trains after w on the same batches of a round, with w fixed as
    training left it, where the paper alternates step by step.

    Args:
        mix: share of the client's own model, alpha of the paper: 0 predicts as FedAvg, 1 as local training alone.
        mix_lr: learning rate of the share, which each client then adapts from `mix` in a third pass over the batches; 0 keeps it.
    """

    def fresh(method: Method, client: Client) -> Tree:
        return with_second(method, client) | {MIX: torch.tensor(float(mix))}

    return Method(settle=on_linear_layers(), leaves=twice, personal=own_leaves, fresh=fresh, local=blended(mix_lr), passes=2 + (mix_lr > 0))
