"""The recipe section `secure_aggregation`, and which methods, recipes and numbers of clients it can work with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field, NonNegativeInt

from fedgraft import seeds
from fedgraft.address import everything
from fedgraft.aggregation.replies import Due, as_packed, no_leaves
from fedgraft.bundle import Bundle
from fedgraft.grafts.lora import Shapes
from fedgraft.methods.method import Method, absorb_updates
from fedgraft.settings import Section
from fedgraft.transforms.secure_aggregation.contribution import Contribution

KEYS, SHARES, TRAIN, UNMASK = "secure_keys", "secure_shares", "train", "secure_unmask"
"""The questions of a round, in their order."""
DUE = {
    KEYS: Due(facts=("public_keys",)),
    SHARES: Due(facts=("sealed_shares", "commitment")),
    UNMASK: Due(facts=("opened_shares",)),
}
"""Those that come with `train`, and what their replies must tell."""
MASKED = "masked"
"""The tree of a reply that stands in the place of `shared`."""
INTEGERS = {32: torch.int32, 64: torch.int64}


class NoSecureAggregation(Section):
    """The coordinator sees each client's shared leaves."""

    name: Literal["none"] = "none"
    """`none`, or `secagg_plus`: clients mask what they send, so that the coordinator learns its sum over the clients and no more."""


class SecAggPlus(Section):
    """SecAgg+ (Bonawitz et al. 2017, Bell et al. 2020): masks that cancel in a sum, shares by which the others open it for who is gone."""

    name: Literal["secagg_plus"] = "secagg_plus"
    threshold: int | None = Field(default=None, ge=2)
    """Shares that recover a client's masks, and so the fewest clients whose sum is opened; more than half of the shares that there are, one
    for the client and each of its neighbours. The others may drop out at any moment. Empty: the least that is more than half, and no less
    than `privacy.least`."""
    neighbours: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """Clients that each one shares masks with, drawn anew in every round; empty: all of the round. The work of a client grows with it."""
    clipping_range: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Largest change of one number in a round; larger ones are cut to it, which a warning tells. Under `privacy.name: client`, whose clip
    bounds them, none is cut."""
    quantisation_bits: int = Field(default=16, ge=2, le=32)
    """Bits of a number before it is masked: changes are rounded at random to multiples of `clipping_range` / (2^(bits - 1) - 1)."""
    modulus_bits: Literal[32, 64] = 32
    """Bits of a masked number on the wire. The sum over all training rows of the largest number must fit, or under `privacy.name: client`
    that over a round's clients with their noise; too small is refused."""

    @property
    def levels(self) -> int:
        """What `clipping_range` becomes."""
        return (1 << self.quantisation_bits - 1) - 1

    @property
    def step(self) -> float:
        """What 1 stands for. Of the weighted mean, no number within the range is further from the exact one than this."""
        return self.clipping_range / self.levels


SecureAggregationSettings: TypeAlias = Annotated[NoSecureAggregation | SecAggPlus, Field(discriminator="name")]


def check_secure_aggregation(
    settings: SecureAggregationSettings, method: Method, name: str, *, compression: str, keep_replies: bool
) -> None:
    """Refuse what sums alone cannot do.

    Raises:
        ValueError: the method needs more than a weighted sum, or the recipe wants single replies; says why.
    """
    if isinstance(settings, NoSecureAggregation):
        return
    why = ""
    if method.pooled or method.personal is everything:
        why = f"method {name!r} sends no leaves"
    elif method.merge.weight is None or method.merge.needs_each_reply:
        why = "the merge is no weighted mean, so it needs each reply; use another method.name, or the mean in federation.merge"
    elif method.absorb is not absorb_updates or method.sent is not as_packed:
        why = f"method {name!r} sends or merges something else than new values of the leaves that it was sent"
    elif method.grown is not no_leaves:
        why = f"method {name!r} with these options has one client send leaves before the first round; set method.shared_graft to false"
    elif compression != "none":
        why = f"compression.name {compression!r} makes numbers that cannot be summed under masks; set it to none"
    elif keep_replies:
        why = "engine.keep_replies keeps single replies, which nobody sees; set it to false"
    if why:
        raise ValueError(f"secure_aggregation.name: {settings.name!r} gives the coordinator a sum alone, and {why}")


def check_clients(settings: SecAggPlus, sampled: int, rows: int, contribution: Contribution | None = None) -> None:
    """Refuse numbers of clients and rows that do not go with the settings.

    Args:
        settings: of the run.
        sampled: clients that are asked in a round.
        rows: training rows of all clients, the largest weight that a sum can have; of no account where contributions are bounded.
        contribution: what one client may contribute, under differential privacy.

    Raises:
        ValueError: they don't; says what would.
    """
    least = contribution.least if contribution is not None else 0
    shares, threshold = shares_of(settings, sampled), threshold_of(settings, sampled, least)
    if least > shares:
        raise ValueError(f"privacy.least: {least} shares of the noise are needed, and a sum may be of {shares} clients; lower it")
    if threshold < least:
        raise ValueError(
            f"secure_aggregation.threshold: a sum of {threshold} clients would lack noise, of which privacy.least is {least} shares; raise "
            "the one to the other, or lower the other"
        )
    if not shares / 2 < threshold <= shares:
        fit = f"between {shares // 2 + 1} and {shares}" if shares > 1 else "nothing fits; ask at least 2 clients in a round"
        raise ValueError(f"secure_aggregation.threshold: {threshold} does not go with the {shares} shares of each secret; {fit}")
    largest, what = settings.levels * rows, f"over {rows} training rows"
    if contribution is not None:
        largest, what = contribution.largest(settings.step, sampled), f"of {sampled} clients' clipped changes and noise"
    if (needed := largest.bit_length() + 1) > settings.modulus_bits:
        raise ValueError(
            f"secure_aggregation.modulus_bits: sums {what} take up to {needed} bits, and there are "
            f"{settings.modulus_bits}; set it to 64, or lower secure_aggregation.quantisation_bits"
        )


def shares_of(settings: SecAggPlus, sampled: int) -> int:
    """Shares of each secret in a round of so many clients."""
    return sampled if settings.neighbours is None else min(settings.neighbours + 1, sampled)


def threshold_of(settings: SecAggPlus, sampled: int, least: int = 0) -> int:
    """Shares that recover a secret in a run that asks so many clients in a round, where sums of fewer than `least` lack noise."""
    return settings.threshold or max(2, shares_of(settings, sampled) // 2 + 1, least)


def neighbourhoods(settings: SecAggPlus, names: Sequence[str], seed: int, number: NonNegativeInt) -> dict[str, frozenset[str]]:
    """Who shares masks with whom in a round: client -> itself and its neighbours, those nearest to it on a ring in random order."""
    shares = shares_of(settings, len(names))
    if shares == len(names):
        return dict.fromkeys(names, frozenset(names))
    ring = [sorted(names)[index] for index in seeds.numpy_rng(seed, "secure_aggregation.ring", number).permutation(len(names))]
    half = shares // 2
    return {name: frozenset(ring[(at + by) % len(ring)] for by in range(-half, half + 1)) for at, name in enumerate(ring)}


def secure_due(settings: SecureAggregationSettings, usual: Mapping[str, Due]) -> dict[str, Due]:
    """What the reply to each question must hold."""
    if isinstance(settings, NoSecureAggregation):
        return dict(usual)

    def masked(shapes: Shapes, package: Bundle, reply: Bundle) -> Mapping[str, Shapes]:
        return {MASKED: as_packed(shapes, package, reply)["shared"]}

    return {**usual, TRAIN: Due(leaves=masked, facts=("masked_counts",), dtype=INTEGERS[settings.modulus_bits])}
