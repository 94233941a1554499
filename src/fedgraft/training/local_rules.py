"""How a client trains in a round: one or more calls of `fit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from torch import Tensor

from fedgraft.training.client import Client
from fedgraft.training.fit import Fit

LocalRule: TypeAlias = Callable[[Client, Mapping[str, Tensor], int, float], Fit]
"""(client, start leaves, round, learning rate) -> what training left."""


def plain(client: Client, start: Mapping[str, Tensor], round_number: int, lr: float) -> Fit:
    """All leaves together, AdamW, no extra loss."""
    moments = {name.removeprefix("moments."): tree for name, tree in client.memory.trees.items() if name.startswith("moments.")}
    return client.fit(start, round_number=round_number, lr=lr, moments=moments or None)
