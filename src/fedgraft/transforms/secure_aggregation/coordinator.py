"""The coordinator's half: one training question becomes four, and many masked replies one that says their weighted mean.

It carries public keys and sealed shares from client to client, adds masked vectors as they come, and asks those that are still there for
shares: of the seeds of vectors in the sum, of the keys of clients that made masks with others and sent nothing. Where too few are left
anywhere the sum stays closed, which is no reply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fedgraft.aggregation.merges import Merge
from fedgraft.aggregation.replies import usable
from fedgraft.aggregation.server import Ask, Reply
from fedgraft.bundle import Bundle
from fedgraft.grafts.lora import Shapes
from fedgraft.transforms.secure_aggregation.contribution import Contribution
from fedgraft.transforms.secure_aggregation.round import ClosedError, Round
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
    shares_of,
    threshold_of,
)
from fedgraft.transforms.secure_aggregation.vector import COUNTS, of_leaves

KEY_PAIRS = 2  # one for masks, one for shares
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

    def plan(
        self,
        merge: Merge,
        sampled: int,
        rows: Callable[[], Mapping[str, int]],
        contribution: Contribution | None = None,
        shapes: Shapes | None = None,
    ) -> list[tuple[str, str]]:
        """Settle the threshold; what will be protected, as a line for the first screen.

        Args:
            merge: of the method.
            sampled: clients that are asked in a round.
            rows: training rows of each client; not asked for where contributions are bounded.
            contribution: what one client may contribute, under differential privacy; None: its change times its weight.
            shapes: of all leaves that the method shares in this model, which matter with bounded contributions.

        Raises:
            ValueError: as `check_clients` and `Contribution.check`.
        """
        if not isinstance(self.settings, SecAggPlus):
            return []
        assert merge.weight is not None
        least, noised = 0, ""
        if contribution is not None:
            contribution.check(self.settings.step, sum(math.prod(shape) for shape in (shapes or {}).values()))
            least = contribution.least
            noised = f"; {least} shares are the whole noise" if least else "; the coordinator adds the noise to them"
        check_clients(self.settings, sampled, sum(map(merge.weight, rows().values())) if contribution is None else 0, contribution)
        shares, self.threshold = shares_of(self.settings, sampled), threshold_of(self.settings, sampled, least)
        spare = f"{shares - self.threshold} of {shares} may drop out" + (" around each" if self.settings.neighbours else "")
        wide = f"{self.settings.modulus_bits // 8} bytes a number"
        return [("", f"masked, {wide}: the coordinator learns sums of at least {self.threshold} clients; {spare}{noised}")]

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
        round_ = Round(self.settings, packages, self.seed, self.threshold)
        try:
            yield self._round(round_)
        except ClosedError as closed:
            self.unopened = str(closed)
            self.listener.warn(f"round {round_.number + 1}: {closed}. The shared leaves stay as they are")

    def _put(self, question: str, packages: dict[str, Bundle]) -> Iterator[Reply]:
        """The usable replies to a question that comes with `train`."""
        return usable(self.engine.ask(question, packages), packages, DUE[question], {}, self.listener.lost)

    def _told(self, reply: Reply, fact: str, good: bool) -> bool:
        """Whether a fact is what it should be; else the reply is lost."""
        if not good:
            self.listener.lost(reply.client, f"the reply of client {reply.client!r} can't be used: its {fact!r} are none")
        return good

    def _round(self, round_: Round) -> Reply:
        for reply in self._put(KEYS, round_.for_keys()):
            keys = _listed(reply.bundle.facts["public_keys"])
            if self._told(reply, "public_keys", len(keys) == KEY_PAIRS and all(isinstance(key, str) for key in keys)):
                round_.public[reply.client] = keys
        round_.check("made keys", round_.public, round_.public)
        for reply in self._put(SHARES, round_.for_shares()):
            round_.sealed[reply.client] = _mapped(reply.bundle.facts["sealed_shares"])
            round_.commitments[reply.client] = str(reply.bundle.facts["commitment"])
        round_.check("shared their secrets", round_.sealed, round_.sealed)
        for reply in self.heard(TRAIN, round_.for_training()):
            counts = _listed(reply.bundle.facts["masked_counts"])
            whole = all(type(number) is int and 0 <= number < 2**64 for number in counts)
            if self._told(reply, "masked_counts", len(counts) == COUNTS and whole):
                round_.add(reply.client, of_leaves(reply.bundle.tree(MASKED), counts, round_.settings))
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


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapped(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
