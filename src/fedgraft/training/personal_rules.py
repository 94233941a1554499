"""Local rules of methods that keep some leaves back: held fixed, trained in turn, or trained as a second model beside the shared one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedgraft.address import MIX, as_first, as_own, within
from fedgraft.training.client import Client
from fedgraft.training.fit import Fit, Penalty
from fedgraft.training.local_rules import LocalRule, distance, kept_moments, plain
from fedgraft.tree import Predicate, apply_delta, combine, partition, subtract

own_leaves = within("own")
"""Predicate: the client's second leaves, and their share."""


def train(
    client: Client,
    leaves: Mapping[str, Tensor],
    round_number: int,
    lr: float,
    *,
    fixed: Mapping[str, Tensor] | None = None,
    penalty: Penalty | None = None,
) -> Fit:
    """The round's batches once, as in plain training, beside `fixed` leaves or with an extra loss."""
    return client.fit(leaves, round_number=round_number, lr=lr, fixed=fixed, penalty=penalty, moments=kept_moments(client))


def around(fixed: Predicate) -> LocalRule:
    """All leaves but the `fixed` ones, which are in use and stay as they are."""

    def run(client: Client, start: Mapping[str, Tensor], round_number: int, lr: float) -> Fit:
        """All leaves but those that stay fixed, AdamW."""
        held, trained = partition(start, fixed)
        return joined(train(client, trained, round_number, lr, fixed=held), unchanged=held)

    return run


def first_alone(client: Client, start: Mapping[str, Tensor], round_number: int, lr: float) -> Fit:
    """The shared leaves alone; second leaves are neither in use nor kept."""
    return plain(client, partition(start, own_leaves)[1], round_number, lr)


def in_turn(first: Predicate) -> LocalRule:
    """The leaves that are `first` with the others fixed, then those with the first fixed: two passes over the round's batches.

    The loss is that of the second pass.
    """

    def run(client: Client, start: Mapping[str, Tensor], round_number: int, lr: float) -> Fit:
        """The personal leaves with the received shared ones fixed, then those with the new personal ones fixed."""
        early, late = partition(start, first)
        before = train(client, early, round_number, lr, fixed=late)
        after = train(client, late, round_number, lr, fixed=before.tree)
        return joined(after, before)

    return run


def pulled(strength: float) -> LocalRule:
    """The shared leaves as FedAvg trains them, and a second model of its own whose loss has strength / 2 ||v - w||^2 to the received w.

    The loss is that of the shared leaves.
    """

    def run(client: Client, start: Mapping[str, Tensor], round_number: int, lr: float) -> Fit:
        """The shared leaves as FedAvg; then the second ones alone, pulled towards the shared ones as received."""
        second, received = partition(start, own_leaves)
        shared = plain(client, received, round_number, lr)
        return joined(shared, train_second(client, second, round_number, lr, penalty=distance(received, strength)))

    return run


def blended(mix_lr: float) -> LocalRule:
    """The shared leaves as FedAvg trains them, then second ones inside a blend with those, then their share `own.mix` at its own rate.

    The loss is that of the shared leaves. A share outside [0, 1] is set to the nearer end; a rate of 0 leaves it as it is.
    """

    def run(client: Client, start: Mapping[str, Tensor], round_number: int, lr: float) -> Fit:
        """The shared leaves as FedAvg; then the second ones by the loss of the blend; then their share, if it has a rate."""
        own, received = partition(start, own_leaves)
        mix, second = partition(own, lambda key: key == MIX)
        shared = plain(client, received, round_number, lr)
        personal = train(client, second, round_number, lr, fixed=combine(shared.tree, mix))
        if mix_lr == 0:
            return joined(shared, personal, unchanged=mix)
        share = train(client, mix, round_number, mix_lr, fixed=combine(shared.tree, personal.tree))
        return joined(shared, personal, replace(share, tree={MIX: share.tree[MIX].clamp(0, 1)}))

    return run


def beside(share: float) -> LocalRule:
    """Second leaves with this share in a blend with the received shared ones, which are fixed; then the shared ones as FedAvg trains them.

    The loss is that of the shared leaves.
    """

    def run(client: Client, start: Mapping[str, Tensor], round_number: int, lr: float) -> Fit:
        """The second leaves in a blend with the received shared ones, which are fixed; then the shared ones as FedAvg."""
        second, received = partition(start, own_leaves)
        personal = train(client, second, round_number, lr, fixed=combine(received, {MIX: torch.tensor(share)}))
        return joined(plain(client, received, round_number, lr), personal)

    return run


def restarted(every: int) -> LocalRule:
    """The shared leaves as FedAvg trains them, and second ones that train alone, every few rounds anew from the shared ones as received.

    The loss is that of the shared leaves; `every` 0: the second ones never start anew.
    """

    def run(client: Client, start: Mapping[str, Tensor], round_number: int, lr: float) -> Fit:
        """The shared leaves as FedAvg; then the second ones alone, every few rounds from the shared ones as received."""
        second, received = partition(start, own_leaves)
        if every and round_number and round_number % every == 0:
            second = as_own(received)
        return joined(plain(client, received, round_number, lr), train_second(client, second, round_number, lr))

    return run


def towards(pull: float, rate: float, inner: int) -> LocalRule:
    """Moreau envelopes: per step of the round a personal model theta, then w -= rate pull (w - theta) for the shared one.

    theta is near the minimum of loss + pull / 2 ||theta - w||^2 on that step's batch, after `inner` steps of AdamW from the theta before,
    the first time from w. The shared leaves become w, the second ones theta; the loss is theta's.
    """

    def run(client: Client, start: Mapping[str, Tensor], round_number: int, lr: float) -> Fit:
        """Per step, personal leaves near the optimum of that batch within reach of the shared ones, which then move towards them."""
        anchor = theta = partition(start, own_leaves)[1]
        fits = []
        for number, parts in enumerate(client.batches(round_number)):
            fits.append(
                client.fit(
                    theta,
                    round_number=round_number,
                    lr=lr,
                    penalty=distance(anchor, pull),
                    purpose=f"fit.{number}",
                    steps=[parts] * inner,
                )
            )
            theta = {key: leaf.cpu() for key, leaf in fits[-1].tree.items()}
            anchor = apply_delta(anchor, {key: change * (rate * pull) for key, change in subtract(theta, anchor).items()})
        return Fit(
            tree=combine(anchor, as_own(theta)),
            loss=sum(fit.loss for fit in fits) / len(fits),
            tokens=sum(fit.tokens for fit in fits),
            seconds=sum(fit.seconds for fit in fits),
        )

    return run


def train_second(client: Client, second: Mapping[str, Tensor], round_number: int, lr: float, penalty: Penalty | None = None) -> Fit:
    """Train second leaves as a model by itself, on the same batches and with the same dropout as the first ones."""
    kept = {name: as_first(partition(tree, own_leaves)[0]) for name, tree in kept_moments(client).items()}
    found = client.fit(as_first(second), round_number=round_number, lr=lr, penalty=penalty, moments=kept)
    moments = {name: as_own(tree) for name, tree in found.moments.items()}
    return Fit(tree=as_own(found.tree), loss=found.loss, tokens=found.tokens, seconds=found.seconds, moments=moments)


def joined(main: Fit, *others: Fit, unchanged: Mapping[str, Tensor] | None = None) -> Fit:
    """Several fits of disjoint leaves as one: the loss of the `main` one, tokens and seconds of all."""
    fits = (main, *others)
    return Fit(
        tree=combine(*(fit.tree for fit in fits), unchanged or {}),
        loss=main.loss,
        tokens=sum(fit.tokens for fit in fits),
        seconds=sum(fit.seconds for fit in fits),
        moments={name: combine(*(fit.moments[name] for fit in fits)) for name in main.moments},
    )
