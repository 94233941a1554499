"""How a client trains in a round: one or more calls of `fit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from fedgraft.address import everything
from fedgraft.training.client import Client
from fedgraft.training.fit import Fit
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
        anchor = {key: leaf.to(client.model.base.device) for key, leaf in start.items() if shared(key)}

        def penalty(leaves: Mapping[str, Tensor]) -> Tensor:
            return mu / 2 * torch.stack([(leaves[key] - leaf).square().sum() for key, leaf in anchor.items()]).sum()

        return client.fit(start, round_number=round_number, lr=lr, penalty=penalty, moments=kept_moments(client))

    return train


def kept_moments(client: Client) -> dict[str, Tree] | None:
    """AdamW's state as the client remembers it (`optimizer_state: kept`), None where there is none."""
    return {name.removeprefix("moments."): tree for name, tree in client.memory.trees.items() if name.startswith("moments.")} or None
