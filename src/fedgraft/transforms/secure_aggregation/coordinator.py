"""The coordinator's half: one training question becomes four, and many masked replies one that says their weighted mean.

It carries public keys and sealed shares from client to client, adds masked vectors as they come, and asks those that are still there for
shares: of the seeds of vectors in the sum, of the keys of clients that made masks with others and sent nothing. Where too few are left
anywhere the sum stays closed, which is no reply.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedgraft.address import is_residual
from fedgraft.aggregation.merges import Merge
from fedgraft.aggregation.replies import usable
from fedgraft.aggregation.server import Ask, Reply
from fedgraft.bundle import Bundle
from fedgraft.transforms.secure_aggregation.client import paired
from fedgraft.transforms.secure_aggregation.primitives import agreed, commitment, join, private_of, public_of
from fedgraft.transforms.secure_aggregation.settings import (
    DUE,
    KEYS,
    MASKED,
    SHARES,
    TRAIN,
    UNMASK,
    SecAggPlus,
    SecureAggregationSettings,
    check_clients,
    neighbourhoods,
    shares_of,
    threshold_of,
)
from fedgraft.transforms.secure_aggregation.vector import COUNTS, Vector, mask, mean_change, of_leaves
from fedgraft.tree import Tree

CUT = 0.001
"""Share of all numbers that may be cut to the range before a warning says so."""


class Asks(Protocol):
    """What reaches clients; an engine does."""

    def ask(self, question: str, packages: dict[str, Bundle]) -> Iterator[Reply]:
        """Replies in the order of the packages; a lost client is absent."""


class Hears(Protocol):
    """Who is told what goes wrong."""

    def lost(self, client: str, reason: str) -> None:
        """No usable reply came from a client."""

    def warn(self, text: str) -> None:
        """Something that the user should know."""


@dataclass
class SecureRounds:
    """Asks clients, for a run with secure aggregation or without."""

    settings: SecureAggregationSettings
    seed: int
    heard: Ask
    """Puts any question of a method; its replies are for the record."""
    engine: Asks
    """Puts the questions that come with `train`; their replies are nobody else's."""
    listener: Hears
    threshold: int = 0
    """Shares that recover a secret."""
    opening: bool = False
    """Clients are asked to open the sum, so one that is lost now is in it all the same."""
    unopened: str = ""
    """Why the last sum stayed closed."""

    def plan(self, merge: Merge, sampled: int, rows: Callable[[], Sequence[int]]) -> list[tuple[str, str]]:
        """Settle the threshold; what will be protected, as a line for the first screen.

        Args:
            merge: of the method.
            sampled: clients that are asked in a round.
            rows: training rows of each client.

        Raises:
            ValueError: as `check_clients`.
        """
        if not isinstance(self.settings, SecAggPlus):
            return []
        assert merge.weight is not None
        check_clients(self.settings, sampled, sum(map(merge.weight, rows())))
        shares, self.threshold = shares_of(self.settings, sampled), threshold_of(self.settings, sampled)
        spare = f"{shares - self.threshold} of {shares} may drop out" + (" around each" if self.settings.neighbours else "")
        wide = f"{self.settings.modulus_bits // 8} bytes a number"
        return [("", f"masked, {wide}: the coordinator learns sums of at least {self.threshold} clients; {spare}")]

    def excuses(self, reason: str) -> bool:
        """Whether a client that is lost now is in the sum all the same; then that is told."""
        if self.opening:
            self.listener.warn(f"{reason}. What it has sent is in the sum all the same")
        return self.opening

    def ask(self, question: str, packages: dict[str, Bundle]) -> Iterator[Reply]:
        """The replies to a question; to `train`, under secure aggregation, one reply with the weighted mean of all, or none.

        Its facts are `examples`, the sum of the weights, and `clients`, how many are in the sum.
        """
        if question != TRAIN or not packages or not isinstance(self.settings, SecAggPlus):
            yield from self.heard(question, packages)
            return
        self.unopened = ""
        round_ = _Round(self.settings, packages, self.seed, self.threshold)
        try:
            yield self._round(round_)
        except _ClosedError as closed:
            self.unopened = str(closed)
            self.listener.warn(f"round {round_.number + 1}: {closed}. The shared leaves stay as they are")

    def _put(self, question: str, packages: dict[str, Bundle]) -> Iterator[Reply]:
        """The usable replies to a question that comes with `train`."""
        return usable(self.engine.ask(question, packages), packages, DUE[question], {}, self.listener.lost)

    def _round(self, round_: _Round) -> Reply:
        for reply in self._put(KEYS, round_.for_keys()):
            round_.public[reply.client] = _listed(reply.bundle.facts["public_keys"])
        round_.check("made keys", round_.public, round_.public)
        for reply in self._put(SHARES, round_.for_shares()):
            round_.sealed[reply.client] = _mapped(reply.bundle.facts["sealed_shares"])
            round_.commitments[reply.client] = str(reply.bundle.facts["commitment"])
        round_.check("shared their secrets", round_.sealed, round_.sealed)
        for reply in self.heard(TRAIN, round_.for_training()):
            counts = _listed(reply.bundle.facts["masked_counts"])
            if len(counts) == COUNTS and all(type(number) is int and 0 <= number < 2**64 for number in counts):
                round_.add(reply.client, of_leaves(reply.bundle.tree(MASKED), counts, round_.settings))
            else:
                self.listener.lost(reply.client, f"the reply of client {reply.client!r} can't be used: its 'masked_counts' are none")
        round_.check("sent masked changes", round_.sent, round_.sealed)
        self.opening = True
        try:
            for reply in self._put(UNMASK, round_.for_unmasking()):
                round_.opened[reply.client] = _mapped(reply.bundle.facts["opened_shares"])
        finally:
            self.opening = False
        round_.check("helped to open the sum", round_.opened, round_.sealed)
        mean, weight, cut = round_.result()
        if cut > CUT:
            self.listener.warn(
                f"round {round_.number + 1}: {cut:.1%} of the numbers changed by more than secure_aggregation.clipping_range "
                f"({round_.settings.clipping_range:g}) and were cut to it; raise it, or lower training.lr"
            )
        return Reply(
            client=f"the sum of {len(round_.sent)} clients",
            bundle=Bundle(trees={"shared": mean}, facts={"examples": weight, "clients": len(round_.sent)}),
        )


class _ClosedError(Exception):
    """The sum cannot be opened."""


@dataclass
class _Round:
    """What the coordinator knows of one round, stage by stage."""

    settings: SecAggPlus
    packages: Mapping[str, Bundle]
    seed: int
    threshold: int
    public: dict[str, list[str]] = field(default_factory=dict)
    sealed: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Client -> neighbour -> what is sealed for it."""
    commitments: dict[str, str] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)
    total: Vector | None = None
    opened: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.number = next((int(str(package.facts["round"])) for package in self.packages.values()), 0)
        self.near = neighbourhoods(self.settings, list(self.packages), self.seed, self.number)

    def for_keys(self) -> dict[str, Bundle]:
        return {name: Bundle(facts={"round": self.number}) for name in self.packages}

    def for_shares(self) -> dict[str, Bundle]:
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
        self.sent.append(client)
        self.total = vector if self.total is None else self.total + vector

    def check(self, what: str, there: Collection[str], of: Collection[str]) -> None:
        """Whether each client of `of` has enough neighbours among those that are there."""
        if there and all(len(self._of(name, there)) >= self.threshold for name in of):
            return
        missing = ", ".join(name for name in self.packages if name not in there) or "nobody"
        near = "" if self.settings.neighbours is None else " around each client"
        raise _ClosedError(
            f"no sum is opened, because {len(there)} of {len(self.packages)} clients {what} and {self.threshold} are needed{near}; "
            f"missing: {missing}"
        )

    def result(self) -> tuple[Tree, int, float]:
        """Shared leaves that have changed by the weighted mean, in float64; the sum of weights; the share of numbers that were cut."""
        total = self._unmasked()
        weight, cut = int(total.counts[0]), int(total.counts[1])
        if not weight:
            raise _ClosedError("no sum is opened, because its weights are none")
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
                raise _ClosedError(f"no sum is opened, because the shares of client {name!r} do not fit its secret")
            total -= mask(seed, size, self.settings)
        for gone in self.sealed.keys() - set(self.sent):
            scalar = self._recovered(gone)
            try:
                private = private_of(scalar)
            except ValueError:
                private = ""
            if not private or public_of(private) != self.public[gone][0]:
                raise _ClosedError(f"no sum is opened, because the shares of client {gone!r} do not fit its key")
            for name in self._of(gone, self.sent):  # takes the mask off again that `name` has put on
                total = paired(total, gone, name, agreed(private, self.public[name][0]), self.settings)
        return total

    def _recovered(self, name: str) -> bytes:
        shares = [str(self.opened[other].get(name)) for other in self._of(name, self.opened)]
        try:
            return join(shares[: self.threshold])
        except ValueError:
            raise _ClosedError(f"no sum is opened, because the shares of client {name!r} are of no secret") from None

    def _of(self, name: str, there: Collection[str]) -> list[str]:
        """Those of `there` that are the client or its neighbours."""
        return sorted(self.near[name].intersection(there))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapped(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
