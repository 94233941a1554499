"""One round as the coordinator sees it: what it carries from client to client, and what it opens in the end."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedgraft.address import is_residual
from fedgraft.bundle import Bundle
from fedgraft.transforms.secure_aggregation.client import paired
from fedgraft.transforms.secure_aggregation.primitives import agreed, commitment, join, private_of, public_of
from fedgraft.transforms.secure_aggregation.settings import SecAggPlus, neighbourhoods
from fedgraft.transforms.secure_aggregation.vector import Vector, mask, mean_change
from fedgraft.tree import Tree


class ClosedError(Exception):
    """The sum cannot be opened."""


@dataclass
class Round:
    """What the coordinator knows of one round, stage by stage."""

    settings: SecAggPlus
    packages: Mapping[str, Bundle]
    seed: int
    threshold: int
    public: dict[str, list[str]] = field(default_factory=dict)
    """Client -> its keys for masks and for shares."""
    sealed: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Client -> neighbour -> what is sealed for it."""
    commitments: dict[str, str] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)
    """Clients whose vectors are in the sum."""
    total: Vector | None = None
    opened: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Client -> whose share it is -> the share."""

    def __post_init__(self) -> None:
        self.number = next((int(str(package.facts["round"])) for package in self.packages.values()), 0)
        self.near = neighbourhoods(self.settings, list(self.packages), self.seed, self.number)

    def for_keys(self) -> dict[str, Bundle]:
        """Nothing but the round."""
        return {name: Bundle(facts={"round": self.number}) for name in self.packages}

    def for_shares(self) -> dict[str, Bundle]:
        """The neighbours' public keys, and the threshold."""
        common = {"round": self.number, "threshold": self.threshold}
        return {
            name: Bundle(facts={**common, "public_keys": {other: self.public[other] for other in self._of(name, self.public)}})
            for name in self.public
        }

    def for_training(self) -> dict[str, Bundle]:
        """The method's own packages, and the clients that a mask is shared with."""
        return {
            name: Bundle(
                trees=self.packages[name].trees,
                facts={**self.packages[name].facts, "peers": [other for other in self._of(name, self.sealed) if other != name]},
            )
            for name in self.sealed
        }

    def for_unmasking(self) -> dict[str, Bundle]:
        """Which neighbours are in the sum and which are not, and what they have sealed for the client."""
        return {
            name: Bundle(
                facts={
                    "round": self.number,
                    "sent": self._of(name, self.sent),
                    "dropped": self._of(name, self.sealed.keys() - set(self.sent)),
                    "sealed_shares": {other: self.sealed[other].get(name) for other in self._of(name, self.sealed) if other != name},
                }
            )
            for name in self.sent
        }

    def add(self, client: str, vector: Vector) -> None:
        """A masked vector has come."""
        self.sent.append(client)
        self.total = vector if self.total is None else self.total + vector

    def check(self, what: str, there: Collection[str], of: Collection[str]) -> None:
        """Pass if each client of `of` has enough neighbours among those that are there.

        Raises:
            ClosedError: one hasn't; says who is missing.
        """
        if there and all(len(self._of(name, there)) >= self.threshold for name in of):
            return
        missing = ", ".join(name for name in self.packages if name not in there) or "nobody"
        near = "" if self.settings.neighbours is None else " around each client"
        raise ClosedError(
            f"no sum is opened, because {len(there)} of {len(self.packages)} clients {what} and {self.threshold} are needed{near}; "
            f"missing: {missing}"
        )

    def result(self) -> tuple[Tree, int, float]:
        """Shared leaves that have changed by the weighted mean, in float64; the sum of weights; the share of numbers that were cut.

        Raises:
            ClosedError: the opened shares are not those of the clients' secrets.
        """
        total = self._unmasked()
        weight, cut = int(total.counts[0]), int(total.counts[1])
        if not weight:
            raise ClosedError("no sum is opened, because its weights are none")
        before = {key: leaf for key, leaf in self.packages[self.sent[0]].tree("shared").items() if not is_residual(key)}
        change = mean_change(total, {key: tuple(leaf.shape) for key, leaf in before.items()}, self.settings)
        after = {key: leaf.double() + change[key] for key, leaf in before.items()}
        return after, weight, cut / max(1, len(total.words) * len(self.sent))

    def _unmasked(self) -> Vector:
        assert self.total is not None
        total, size = self.total, len(self.total.words)
        for name in self.sent:
            seed = self._recovered(name)
            if commitment(seed) != self.commitments[name]:
                raise ClosedError(f"no sum is opened, because the shares of client {name!r} do not fit its secret")
            total -= mask(seed, size, self.settings)
        for gone in self.sealed.keys() - set(self.sent):
            scalar = self._recovered(gone)
            try:
                private = private_of(scalar)
            except ValueError:
                private = ""
            if not private or public_of(private) != self.public[gone][0]:
                raise ClosedError(f"no sum is opened, because the shares of client {gone!r} do not fit its key")
            for name in self._of(gone, self.sent):  # takes the mask off again that `name` has put on
                total = paired(total, gone, name, agreed(private, self.public[name][0]), self.settings)
        return total

    def _recovered(self, name: str) -> bytes:
        shares = [str(self.opened[other].get(name)) for other in self._of(name, self.opened)]
        try:
            return join(shares[: self.threshold])
        except ValueError:
            raise ClosedError(f"no sum is opened, because the shares of client {name!r} are of no secret") from None

    def _of(self, name: str, there: Collection[str]) -> list[str]:
        """Those of `there` that are the client or its neighbours."""
        return sorted(self.near[name].intersection(there))
