"""APFL (Deng et al. 2020, arXiv 2003.13461, Algorithm 1): a personal model that is a blend of the shared and an own one."""

from __future__ import annotations

import torch

from fedgraft.address import MIX
from fedgraft.methods._linear import on_linear_layers
from fedgraft.methods._personal import twice, with_second
from fedgraft.methods.method import Method
from fedgraft.training.client import Client
from fedgraft.training.personal_rules import blended, own_leaves
from fedgraft.tree import Tree


def build(mix: float = 0.5, mix_lr: float = 0.0) -> Method:
    """The shared path is FedAvg's. A client predicts with mix v + (1 - mix) w and trains v by the loss of that blend.

    v is a second pair at every projection; blended are the changes of the weights, mix B_v A_v + (1 - mix) B_w A_w, where the paper blends
    parameters (our adaptation: factors cannot be blended one by one). v trains after w on the same batches of a round, with w fixed as
    training left it, where the paper alternates step by step.

    Args:
        mix: share of the client's own model, alpha of the paper, 0 to 1: 0 predicts as FedAvg, 1 as local training alone.
        mix_lr: learning rate of the share, which each client then adapts from `mix` in a third pass over the batches; 0 keeps it.

    Raises:
        ValueError: a share outside [0, 1] or a negative rate.
    """
    if not 0 <= mix <= 1 or mix_lr < 0:
        raise ValueError(f"method.mix, method.mix_lr: {mix}, {mix_lr}; choose a share from 0 to 1 and a rate of 0 or more")

    def fresh(method: Method, client: Client) -> Tree:
        return with_second(method, client) | {MIX: torch.tensor(float(mix))}

    return Method(settle=on_linear_layers(), leaves=twice, personal=own_leaves, fresh=fresh, local=blended(mix_lr))
