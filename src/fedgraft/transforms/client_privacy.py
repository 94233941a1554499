"""Differential privacy of clients: their changes are clipped, summed, noised and divided by a number that is known before.

The client's half clips what it sends, and adds its share of the noise where clients do that; the order is clip, noise, compress. The
coordinator's half stands in the place of `absorb_updates`. Before it adds noise it clips once more what it has decoded: so one client
moves the sum by no more than the clip whatever it has sent, be it a hostile one, or one whose error feedback carries on what compression
left out.

What a client sends may depend on its memory and so on the rounds that it was in before. That takes nothing from amplification by
sampling: given all that was released, a round is a mixture over those pasts, in each of which the client is in it with probability q and
moves the sum by no more than the clip, and the Rényi divergence of mixtures is no larger than the largest of their parts.

Personal leaves are no part of a reply; they get neither clip nor noise. A server step on the noised mean is post-processing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedgraft.address import is_residual
from fedgraft.aggregation.merges import Update, uniform
from fedgraft.aggregation.server import Reply, Server
from fedgraft.bundle import Bundle
from fedgraft.methods.method import Method
from fedgraft.training.client import Client
from fedgraft.transforms.noise import Noise
from fedgraft.transforms.privacy import ClientPrivacy, Question
from fedgraft.tree import Tree, partition, subtract

CLIP = "clip"
"""The fact of the state and of packages that holds the clip of the round; only where it follows a quantile, else the recipe's holds."""
WITHIN = "within"
"""The fact of a reply that tells whether the change was within the clip; only where the clip follows a quantile."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is fixed before the first round."""

    settings: ClientPrivacy
    expected: int
    """Clients of a round, on average: the divisor, whoever comes."""
    noise: Noise
    """The coordinator's."""
    masked: bool = False
    """The coordinator sees sums of what clients have clipped by themselves, and stays where it is without one."""

    def __post_init__(self) -> None:
        least, counting = self.settings.shares, self.settings.quantile is not None
        if least > self.expected:
            raise ValueError(f"privacy.least: {least} replies are needed, and a round asks {self.expected} clients; lower it")
        if counting and 2 * self.counting <= self.settings.noise_multiplier:
            raise ValueError(
                f"privacy.quantile_noise: {self.counting:g} alone gives away more than noise_multiplier allows; set more than "
                f"{self.settings.noise_multiplier / 2:g}"
            )

    @property
    def counting(self) -> float:
        """Standard deviation of the noise on the number of clients within the clip."""
        return self.settings.quantile_noise or max(self.expected / 20, self.settings.noise_multiplier)

    @property
    def multiplier(self) -> float:
        """Noise on the sum of changes in units of the clip: z, or (z^-2 - (2 counting)^-2)^-1/2, which together with the count is worth z.

        The count is taken as a sum of within - 1/2, which one client changes by 1/2 (Andrew et al. 2021, Theorem 1).
        """
        z = self.settings.noise_multiplier
        return z if z == 0 or self.settings.quantile is None else (z**-2 - (2 * self.counting) ** -2) ** -0.5


def clip_in(settings: ClientPrivacy, place: Bundle) -> float | None:
    """The clip of a round, from the state that it begins with or from a package of it; None: no bound."""
    followed = place.facts.get(CLIP) if settings.quantile is not None else None
    return float(followed) if isinstance(followed, int | float) else settings.clip


def norm_of(tree: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all leaves."""
    return math.sqrt(sum(float(tree[key].double().square().sum()) for key in sorted(tree)))


def share_within(norm: float, clip: float | None) -> float:
    """What a contribution is multiplied with so that its norm is at most the clip; exactly 1 where it is."""
    return 1.0 if clip is None or norm <= clip else clip / norm


def clipped(settings: ClientPrivacy, noise_of: Callable[[str], Noise], question: Question) -> Question:
    """The client's half of the question `train`.

    Args:
        settings: of the run.
        noise_of: a client's own noise.
        question: what is asked.
    """

    def asked(client: Client, package: Bundle) -> Bundle:
        reply = question(client, package)
        received, clip = package.tree("shared"), clip_in(settings, package)
        change = subtract(reply.tree("shared"), received)
        norm = norm_of(change)
        share = share_within(norm, clip)
        sent = {key: leaf * share for key, leaf in change.items()} if share < 1 else change
        if settings.shares and clip is not None and settings.noise_multiplier > 0:
            deviation, own = settings.noise_multiplier * clip / math.sqrt(settings.shares), noise_of(client.name)
            sent = _noised(sent, change, own, deviation, "share", str(package.facts["round"]))
        shared = reply.tree("shared") if sent is change else {key: (received[key].double() + leaf).float() for key, leaf in sent.items()}
        told = {WITHIN: norm <= clip} if settings.quantile is not None and clip is not None else {}
        return Bundle(trees={**reply.trees, "shared": shared}, facts={**reply.facts, **told})

    return asked


def protected(terms: Terms, method: Method) -> Method:
    """The coordinator's half: the method with packages that tell a clip that moves, and with noised merges."""

    def pack(own: Method, server: Server, client: str) -> Bundle:
        package = method.pack(own, server, client)
        told = {CLIP: clip_in(terms.settings, server.state)} if terms.settings.quantile is not None else {}
        return Bundle(trees=package.trees, facts={**package.facts, **told})

    def absorb(own: Method, server: Server, replies: Iterator[Reply]) -> None:
        _absorb(terms, own, server, replies)

    return replace(method, pack=pack, absorb=absorb)


def _absorb(terms: Terms, method: Method, server: Server, replies: Iterator[Reply]) -> None:
    """Merge the replies as they come, add the noise that is due even where nobody came, and take the server step."""
    shared = partition(server.state.tree("shared"), is_residual)[1]
    clip, holders, within, came = clip_in(terms.settings, server.state), Counter[str](), list[float](), list[int]()

    def updates() -> Iterator[Update]:
        for reply in replies:
            change = subtract(reply.bundle.tree("shared"), shared)
            share = 1.0 if terms.settings.shares or terms.masked else share_within(norm_of(change), clip)
            delta = {key: leaf * share for key, leaf in change.items()} if share < 1 else change
            within.append(0.5 if reply.bundle.facts.get(WITHIN) is True else -0.5)
            came.append(int(str(reply.bundle.facts.get("clients", 1))))  # one reply may be the mean of several
            holders.update(dict.fromkeys(delta, came[-1]))
            yield Update(client=reply.client, delta=delta, examples=1)

    mean = uniform.run(updates())  # over those who hold a leaf; who does not, and who did not come, counts as no change
    if sum(came) < max(terms.settings.shares, terms.masked):
        return
    merged = {key: leaf * (holders[key] / terms.expected) for key, leaf in mean.items()}
    if not terms.settings.shares and clip is not None and terms.multiplier > 0:
        merged = _noised(merged, shared, terms.noise, terms.multiplier * clip / terms.expected, "sum", str(server.round))
    state = method.step(server.state, merged)
    if terms.settings.quantile is not None and clip is not None:
        state = Bundle(trees=state.trees, facts={**state.facts, CLIP: _followed(terms, clip, sum(within), server.round)})
    server.state = state


def _noised(tree: Tree, wanted: Mapping[str, Tensor], noise: Noise, deviation: float, *stream: str) -> Tree:
    """The tree + noise on all `wanted` leaves, those that it lacks too."""
    own = noise.about(tree)
    return {
        key: tree.get(key, leaf.new_zeros(leaf.shape).double()) + own.normal(tuple(leaf.shape), *stream, key) * deviation
        for key, leaf in wanted.items()
    }


def _followed(terms: Terms, clip: float, halves: float, round_number: int) -> float:
    """The next clip: times exp(-lr (share within - quantile)), the share noised and of the clients that were expected."""
    settings = terms.settings
    assert settings.quantile is not None
    deviation = terms.counting if settings.noise_multiplier > 0 else 0.0
    own = terms.noise.about({"halves": torch.tensor([halves, clip], dtype=torch.float64)})
    noise = float(own.normal((1,), "within", round_number)[0]) * deviation
    share = 0.5 + (halves + noise) / terms.expected
    return clip * math.exp(-settings.quantile_lr * (share - settings.quantile))
