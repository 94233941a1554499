"""How a client trains in a round: one or more calls of `fit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from fedgraft.address import everything
from fedgraft.training.client import Client
from fedgraft.training.fit import Fit, Penalty
from fedgraft.tree import Predicate, Tree

LocalRule: TypeAlias = Callable[[Client, Mapping[str, Tensor], int, float], Fit]
"""(client, start leaves, round, learning rate) -> what training left."""


def plain(client: Client, start: Mapping[str, Tensor], round_number: int, lr: float) -> Fit:
    """All leaves together, AdamW, no extra loss."""
    return client.fit(start, round_number=round_number, lr=lr, moments=kept_moments(client))


def proximal(mu: float, shared: Predicate = everything) -> LocalRule:
    """A rule that holds the `shared` leaves near their start (FedProx, Li et al. 2020)."""

    def train(client: Client, start: Mapping[str, Tensor], round_number: int, lr: float) -> Fit:
        """All leaves together, AdamW, with mu/2 ||w - w_g||^2 added to the loss, w_g being the leaves received."""
        penalty = distance({key: leaf for key, leaf in start.items() if shared(key)}, mu)
        return client.fit(start, round_number=round_number, lr=lr, penalty=penalty, moments=kept_moments(client))

    return train


def distance(anchor: Mapping[str, Tensor], strength: float) -> Penalty:
    """Penalty strength / 2 ||v - anchor||^2 over the trained leaves v that `anchor` names, wherever they lie."""

    def penalty(leaves: Mapping[str, Tensor]) -> Tensor:
        squares = [(leaf - anchor[key].to(leaf.device)).square().sum() for key, leaf in leaves.items() if key in anchor]
        return torch.stack([square.to(squares[0].device) for square in squares]).sum() * (strength / 2)

    return penalty


def kept_moments(client: Client) -> dict[str, Tree]:
    """AdamW's state as the client remembers it (`optimizer_state: kept`), of all leaves; `fit` takes what it needs."""
    return {name.removeprefix("moments."): tree for name, tree in client.memory.trees.items() if name.startswith("moments.")}
