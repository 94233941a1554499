"""Attackers in a simulation: some clients send what harms the federation, so that merges can be compared under it.

Only where all clients are in one process: an attack is an experiment of whoever runs all of them, and no site does anything of the kind.
Attackers train as everybody does, on poisoned rows or with their reply changed; they are not evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from fedgraft import seeds
from fedgraft.address import everything
from fedgraft.bundle import Bundle
from fedgraft.data.example import Example
from fedgraft.methods.method import Method
from fedgraft.settings import Section
from fedgraft.training.client import Client
from fedgraft.tree import Tree, apply_delta, subtract

IN_ONE_PROCESS = frozenset({"inprocess"})
Question: TypeAlias = Callable[[Client, Bundle], Bundle]


class NoAttack(Section):
    """Every client is honest."""

    name: Literal["none"] = "none"
    """`none`, or what attackers do: `sign_flip` and `scale` send the opposite or a multiple of their change, `noise` a random one,
    `label_flip` trains on rows whose responses are permuted."""


class _Attack(Section):
    """Some of the clients attack."""

    name: str
    """The attack."""
    clients: NonNegativeInt | tuple[str, ...] = 1
    """The attackers: by name, or how many, drawn from the seed."""


class _Altered(_Attack):
    """They send another change than they made."""

    factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """How many times the honest change's size."""

    def change(self, honest: Tree, generator: torch.Generator) -> Tree:
        """What is sent in the place of an honest change, float64."""
        raise NotImplementedError


class SignFlip(_Altered):
    """The change the other way round, times `factor` (Li et al. 2019)."""

    name: Literal["sign_flip"] = "sign_flip"

    def change(self, honest: Tree, generator: torch.Generator) -> Tree:
        """-factor * change."""
        return {key: leaf * -self.factor for key, leaf in honest.items()}


class Scale(_Altered):
    """The change times `factor`, as in model replacement (Bagdasaryan et al. 2020)."""

    name: Literal["scale"] = "scale"
    factor: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    """How many times the honest change's size."""

    def change(self, honest: Tree, generator: torch.Generator) -> Tree:
        """Factor * change."""
        return {key: leaf * self.factor for key, leaf in honest.items()}


class Noise(_Altered):
    """A Gaussian change whose leaves have the norms of the honest one's, times `factor` (Blanchard et al. 2017)."""

    name: Literal["noise"] = "noise"

    def change(self, honest: Tree, generator: torch.Generator) -> Tree:
        """Drawn leaf by leaf in the order of addresses."""

        def drawn(leaf: Tensor) -> Tensor:
            noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            return noise * (self.factor * leaf.norm() / noise.norm()) if leaf.numel() else noise

        return {key: drawn(leaf) for key, leaf in sorted(honest.items())}


class LabelFlip(_Attack):
    """Training rows whose responses are permuted among the client's rows, each other one's: what flipped labels are to generation."""

    name: Literal["label_flip"] = "label_flip"


AttackSettings: TypeAlias = Annotated[NoAttack | SignFlip | Scale | Noise | LabelFlip, Field(discriminator="name")]


def check_attack(settings: AttackSettings, method: Method, name: str, engine: str) -> None:
    """Refuse what makes no sense.

    Raises:
        ValueError: clients are other parties, or nothing of theirs is merged.
    """
    if isinstance(settings, NoAttack):
        return
    if engine not in IN_ONE_PROCESS:
        raise ValueError(f"attack.name: {settings.name!r} is for simulations in one process, not for engine {engine!r}; set it to none")
    if method.pooled or method.personal is everything:
        raise ValueError(f"attack.name: {settings.name!r} attacks what is merged, and method {name!r} merges nothing; set it to none")
    if isinstance(settings, _Altered) and not method.merges_changes:
        raise ValueError(f"attack.name: {settings.name!r} alters changes, and method {name!r} merges whole factors; choose label_flip")


def attackers(settings: AttackSettings, clients: Sequence[str], seed: int) -> frozenset[str]:
    """Who attacks.

    Raises:
        ValueError: there is no such client, or nobody would be honest.
    """
    if isinstance(settings, NoAttack):
        return frozenset()
    if isinstance(settings.clients, int):
        order = seeds.numpy_rng(seed, "attack").permutation(len(clients))
        chosen = frozenset(sorted(clients)[index] for index in order[: settings.clients])
    else:
        chosen = frozenset(settings.clients)
    if unknown := sorted(chosen - set(clients)):
        raise ValueError(f"attack.clients: there is no client {unknown[0]!r}; there are: {', '.join(sorted(clients))}")
    if len(chosen) >= len(clients):
        raise ValueError(f"attack.clients: of {len(clients)} clients none would be honest; lower it")
    return chosen


def honest(settings: AttackSettings, clients: Sequence[str], seed: int) -> list[str]:
    """The others, who are evaluated.

    Raises:
        ValueError: as `attackers`.
    """
    chosen = attackers(settings, clients, seed)
    return [name for name in clients if name not in chosen]


def attacking(settings: AttackSettings, clients: Sequence[str], seed: int, question: Question) -> Question:
    """The question `train`, answered by attackers in their own way; honest clients answer as ever.

    Raises:
        ValueError: as `attackers`.
    """
    chosen = attackers(settings, clients, seed)

    def asked(client: Client, package: Bundle) -> Bundle:
        if client.name not in chosen:
            return question(client, package)
        if isinstance(settings, _Altered):
            return _altered(settings, question(client, package), package, seed, client.name)
        own = client.data
        client.data = replace(own, train=flipped(own.train, seed, client.name))
        try:
            return question(client, package)
        finally:
            client.data = own

    return asked if chosen else question


def flipped(rows: Sequence[Example], seed: int, client: str) -> list[Example]:
    """The rows with their responses moved on along a random cycle: with two rows or more none keeps its own."""
    order = seeds.numpy_rng(seed, "attack", client).permutation(len(rows)).tolist()
    given = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    return [replace(row, response=rows[given[index]].response, choices=()) for index, row in enumerate(rows)]


def _altered(settings: _Altered, reply: Bundle, package: Bundle, seed: int, client: str) -> Bundle:
    """The reply with another change of the shared leaves; a draw of its own for every client and round."""
    sent, facts = reply.tree("shared"), package.facts
    received = {key: package.tree("shared")[key] for key in sent}
    change = settings.change(subtract(sent, received), seeds.torch_rng(seed, "attack", client, str(facts["round"])))
    return Bundle(trees={**reply.trees, "shared": apply_delta(received, change)}, facts=reply.facts)
