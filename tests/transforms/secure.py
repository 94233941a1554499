"""Clients that train nothing and mask what they are told to, and an engine over them that remembers all that the coordinator gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedgraft.aggregation.merges import by_examples
from fedgraft.aggregation.server import Reply
from fedgraft.bundle import Bundle
from fedgraft.transforms.noise import seeded
from fedgraft.transforms.secure_aggregation.client import masked_questions
from fedgraft.transforms.secure_aggregation.contribution import Contribution
from fedgraft.transforms.secure_aggregation.coordinator import SecureRounds
from fedgraft.transforms.secure_aggregation.settings import SecAggPlus
from fedgraft.tree import Tree

NAMES = ("ada", "bo", "cy", "di", "ed", "flo", "gus", "hal")
SHAPES = {"layers.0.attention.q.A": (2, 7), "layers.0.attention.q.B": (5,), "layers.1.attention.v.A": ()}
Fate = Callable[[str, str], str]
"""(question, client) -> "" (it answers), "down" (it is never asked) or "late" (it answers, and the answer is not used)."""


@dataclass
class One:
    """As much of a client as masks need."""

    name: str
    examples: int
    seed: int = 0


@dataclass
class Cohort:
    """The clients of one process, as an engine; `received` is all that reaches the coordinator."""

    folder: Path
    settings: SecAggPlus
    clients: list[One]
    fate: Fate = lambda question, client: ""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: dict(SHAPES))
    received: list[tuple[str, str, Bundle]] = field(default_factory=list)
    sent: list[tuple[str, str, Bundle]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    scale: float = 0.02
    contribution: Contribution | None = None

    def __post_init__(self) -> None:
        own = self.contribution and replace(self.contribution, noise_of=lambda client: seeded(0, "client", client))
        self.questions = masked_questions(self.settings, {"train": self.train}, by_examples.weight, self.folder, own)
        self.rounds = SecureRounds(self.settings, 0, self.ask, self, self)
        rows = {one.name: one.examples for one in self.clients}
        self.rounds.plan(by_examples, len(self.clients), lambda: rows, self.contribution, self.shapes)

    def start(self, number: int = 0) -> Tree:
        """What all are sent."""
        rng = torch.Generator().manual_seed(number)
        return {key: torch.randn(shape, generator=rng) for key, shape in self.shapes.items()}

    def change(self, client: str) -> Tree:
        """What a client changes."""
        rng = torch.Generator().manual_seed(1 + NAMES.index(client))
        return {key: torch.randn(shape, generator=rng) * self.scale for key, shape in self.shapes.items()}

    def trained(self, client: str, number: int = 0) -> Tree:
        """What a client makes of what it is sent."""
        return {key: leaf + self.change(client)[key] for key, leaf in self.start(number).items()}

    def train(self, client: Any, package: Bundle) -> Bundle:
        facts = {"examples": client.examples, "loss": 1.0}
        return Bundle(trees={"shared": self.trained(client.name, int(str(package.facts["round"])))}, facts=facts)

    def answer(self, question: str, client: str, package: Bundle) -> Bundle:
        one = next(one for one in self.clients if one.name == client)
        return Bundle.decode(self.questions[question](one, Bundle.decode(package.encode())).encode())  # type: ignore[arg-type]

    def ask(self, question: str, packages: dict[str, Bundle]) -> Iterator[Reply]:
        for name, package in packages.items():
            fate = self.fate(question, name)
            if fate == "down":
                continue
            self.sent.append((question, name, package))
            reply = self.answer(question, name, package)
            self.received.append((question, name, reply))
            if not fate:
                yield Reply(client=name, bundle=reply)

    def lost(self, client: str, reason: str) -> None:
        self.warnings.append(reason)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def round(self, number: int = 0) -> Bundle | None:
        """The one reply of a round, if its sum was opened."""
        packages = {one.name: Bundle(trees={"shared": self.start(number)}, facts={"round": number, "lr": 1e-3}) for one in self.clients}
        replies = list(self.rounds.ask("train", packages))
        assert len(replies) <= 1
        return replies[0].bundle if replies else None


def cohort(
    folder: Path,
    count: int = 4,
    fate: Fate = lambda question, client: "",
    contribution: Contribution | None = None,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    **settings: Any,
) -> Cohort:
    """So many clients with 1, 2, 3, ... rows."""
    clients = [One(name, examples=1 + at) for at, name in enumerate(NAMES[:count])]
    return Cohort(folder, SecAggPlus(**settings), clients, fate, dict(shapes), contribution=contribution)
