"""Client-level privacy on single merges: clip, sensitivity, noise, the adaptive clip, and what leaves a client."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import strategies as st

from fedgraft.aggregation.server import Reply, Server
from fedgraft.aggregation.settings import FederationSettings
from fedgraft.bundle import Bundle
from fedgraft.methods.method import Method
from fedgraft.transforms.client_privacy import CLIP, WITHIN, Terms, clipped, norm_of, protected
from fedgraft.transforms.codings import Int8
from fedgraft.transforms.compression import compressed, restored
from fedgraft.transforms.noise import Noise, seeded
from fedgraft.transforms.privacy import ClientPrivacy
from fedgraft.tree import equal, subtract
from tests.strategies import given

A, B = "layers.0.attention.q.A", "layers.0.attention.q.B"
SHAPES = {A: (3, 5), B: (4, 3)}


class Memory:
    """A client that has a name and remembers."""

    name = "ada"

    def __init__(self):
        self.memory = Bundle()

    def remember(self, *, trees):
        self.memory = Bundle(trees={**self.memory.trees, **trees})


def leaves(seed, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=rng) * scale for key, shape in SHAPES.items()}


def server_of(state, clients=4):
    names = [f"c{number}" for number in range(clients)]
    shared = Bundle(trees={"shared": state})
    return Server(clients=names, seed=0, federation=FederationSettings(), lr=1e-3, lr_min=1e-4, fresh_shared=dict, state=shared)


def settings_of(**options):
    return ClientPrivacy(**{"noise_multiplier": 0.0, **options})


def terms_of(expected=4, **options):
    return Terms(settings=settings_of(**options), expected=expected, noise=seeded(0))


def merged(terms, state, trained, facts=None):
    """The server's state after one merge of these trained leaves."""
    method, server = protected(terms, Method()), server_of(state)
    replies = [Reply(client=name, bundle=Bundle(trees={"shared": tree}, facts=facts or {})) for name, tree in trained.items()]
    method.absorb(method, server, iter(replies))
    return server.state


def sent(settings, start, trained, facts=None, clip=None):
    """What a client sends of trained leaves."""
    question = clipped(settings, lambda name: seeded(1, name), lambda client, package: Bundle(trees={"shared": trained}, facts=facts or {}))
    return question(Memory(), Bundle(trees={"shared": start}, facts={CLIP: clip, "round": 0}))


def test_without_clip_and_noise_it_is_the_plain_mean_bit_for_bit():
    """Replies are the very leaves, and clients of equal numbers of rows merge to the same bits as FedAvg's."""
    state = leaves(0)
    trained = {f"c{number}": leaves(number + 1) for number in range(4)}
    settings = settings_of(clip=None)
    for tree in trained.values():
        assert equal(sent(settings, state, tree).tree("shared"), tree)
    plain, server = Method(), server_of(state)
    replies = [Reply(client=name, bundle=Bundle(trees={"shared": tree}, facts={"examples": 7})) for name, tree in trained.items()]
    plain.absorb(plain, server, iter(replies))
    assert equal(merged(terms_of(clip=None), state, trained).tree("shared"), server.state.tree("shared"))


@given(seed=st.integers(0, 2**32), clip=st.floats(1e-3, 50), scale=st.sampled_from([1e-4, 1.0, 30.0]))
def test_a_client_sends_no_more_than_the_clip_in_the_same_direction(seed, clip, scale):
    start, trained = leaves(seed), leaves(seed + 1, scale)
    reply = sent(settings_of(clip=clip), start, trained)
    change, true = subtract(reply.tree("shared"), start), subtract(trained, start)
    norm = norm_of(true)
    assert norm_of(change) <= clip * (1 + 1e-4) + 1e-4  # rounded to fp32
    if norm <= clip:
        assert equal(reply.tree("shared"), trained)
    for key in SHAPES:
        torch.testing.assert_close(change[key], true[key] * min(1.0, clip / norm), rtol=1e-3, atol=1e-5)


@given(
    seed=st.integers(0, 2**32),
    clip=st.floats(1e-2, 10),
    scale=st.sampled_from([1e-3, 1.0, 1e6]),
    there=st.integers(1, 4),
)
def test_the_sensitivity_is_the_clip_over_the_expected_clients(seed, clip, scale, there):
    """Brute force over whom to leave out, among hostile clients that never clip: the noise-free mean moves by no more than clip / expected.

    The largest move is that of a client which is beyond the clip, and it is reached.
    """
    state = leaves(seed)
    trained = {f"c{number}": leaves(seed + 1 + number, scale) for number in range(there)}
    terms = terms_of(clip=clip)
    whole = {key: leaf.double() for key, leaf in merged(terms, state, trained).tree("shared").items()}
    for gone, sent_by_it in trained.items():
        rest = merged(terms, state, {name: tree for name, tree in trained.items() if name != gone}).tree("shared")
        move = norm_of(subtract(whole, rest))
        bound = min(clip, norm_of(subtract(sent_by_it, state))) / 4
        assert move == pytest.approx(bound, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("scale", [1e-2, 1e4])
def test_what_compression_carries_on_is_clipped_again(scale):
    """Error feedback hands on what was left out, so that a decoded change can be longer than the clip; the coordinator's clip holds."""
    state, client, settings = leaves(0), Memory(), settings_of(clip=0.5)
    coding = Int8()
    for number in range(4):
        trained = Bundle(trees={"shared": leaves(number + 1, scale)})
        inner = clipped(settings, lambda name: seeded(1), lambda client, package, trained=trained: trained)
        package = Bundle(trees={"shared": state}, facts={CLIP: 0.5, "round": number})
        reply = Reply(client="c0", bundle=compressed(coding, inner)(client, package))
        (whole,) = restored(coding, iter([reply]), {"c0": package}, lambda client, reason: pytest.fail(reason))
        moved = subtract(merged(terms_of(clip=0.5), state, {"c0": whole.bundle.tree("shared")}).tree("shared"), state)
        assert norm_of(moved) <= 0.5 / 4 * (1 + 1e-4)


def test_noise_has_the_stated_deviation_and_is_on_every_leaf():
    """z clip / expected on each number: 40 rounds of 27 numbers, the variance within 5 sqrt(2 / n); also where nobody came."""
    state = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    terms = terms_of(clip=2.0, noise_multiplier=1.5)
    found = []
    for number in range(40):
        server, method = server_of(state), protected(terms, Method())
        server.round = number
        method.absorb(method, server, iter([]))
        assert set(server.state.tree("shared")) == set(SHAPES)
        found.append(torch.cat([leaf.flatten() for leaf in server.state.tree("shared").values()]))
    numbers = torch.cat(found).double() / (1.5 * 2.0 / 4)
    assert abs(float(numbers.var()) - 1) < 5 * (2 / numbers.numel()) ** 0.5
    assert abs(float(numbers.mean())) < 5 / numbers.numel() ** 0.5


def test_the_same_sum_gets_the_same_noise_and_another_one_other_noise():
    """So a round that is done again releases nothing new, and two sums with equal noise can't be subtracted."""
    state, distances = leaves(0), []
    for noise in (Noise(b"secret"), seeded(0)):
        terms = Terms(settings=settings_of(clip=1.0, noise_multiplier=1.0), expected=4, noise=noise)
        one, again = (merged(terms, state, {"c0": leaves(1)}) for _ in range(2))
        assert equal(one.tree("shared"), again.tree("shared"))
        found = []
        for sent_by_it in (leaves(1), leaves(2)):
            noised, plain = (merged(given, state, {"c0": sent_by_it}).tree("shared") for given in (terms, terms_of(clip=1.0)))
            found.append(subtract(noised, plain))
        distances.append(norm_of(subtract(*found)))
    assert distances[0] > 0.1
    assert distances[1] < 1e-5, "in a simulation runs that differ a little have the same noise"


def test_shares_of_the_clients_add_up_to_the_noise():
    """`least` shares of deviation z clip / sqrt(least) each; the coordinator adds none, and does not merge fewer replies."""
    state = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    settings = settings_of(clip=2.0, noise_multiplier=1.5, where="clients", least=3)
    terms = Terms(settings=settings, expected=4, noise=seeded(0))
    numbers = []
    for number in range(40):
        shares = {}
        for name in ("c0", "c1", "c2"):
            question = clipped(settings, lambda _, name=name: seeded(7, name), lambda client, package: Bundle(trees={"shared": state}))
            package = Bundle(trees={"shared": state}, facts={CLIP: 2.0, "round": number})
            shares[name] = question(Memory(), package).tree("shared")
        found = merged(terms, state, shares).tree("shared")
        numbers.append(torch.cat([leaf.flatten() for leaf in found.values()]))
        few = merged(terms, state, dict(itertools.islice(shares.items(), 2)))
        assert equal(few.tree("shared"), state)
    spread = torch.cat(numbers).double() / (1.5 * 2.0 / 4)
    assert abs(float(spread.var()) - 1) < 5 * (2 / spread.numel()) ** 0.5


def test_the_clip_follows_the_quantile_by_hand():
    """Andrew et al. 2021, without noise: two of four expected clients are within the clip, quantile 0.8: clip exp(-0.2 (0.5 - 0.8)).

    A client that did not come counts as half: 0.5 + (0.5 + 0.5 - 0.5 - 0.5) / 4 for all four, 0.5 + 0.5 / 4 for one within alone.
    """
    state, options = leaves(0), {"clip": 1.5, "quantile": 0.8, "quantile_noise": 1.0}
    terms = terms_of(**options)
    method, server = protected(terms, Method()), server_of(state)
    assert method.pack(method, server, "c0").facts[CLIP] == 1.5
    replies = [Reply(client=f"c{n}", bundle=Bundle(trees={"shared": state}, facts={WITHIN: n < 2})) for n in range(4)]
    method.absorb(method, server, iter(replies))
    assert server.state.facts[CLIP] == pytest.approx(1.5 * math.exp(-0.2 * (0.5 - 0.8)), rel=1e-12)
    assert method.pack(method, server, "c0").facts[CLIP] == server.state.facts[CLIP]
    alone = merged(terms, state, {"c0": state}, facts={WITHIN: True})
    assert alone.facts[CLIP] == pytest.approx(1.5 * math.exp(-0.2 * (0.625 - 0.8)), rel=1e-12)
    assert sent(settings_of(**options), state, state, clip=1.5).facts == {WITHIN: True}
    assert sent(settings_of(**options), state, leaves(1, 9.0), clip=1.5).facts == {WITHIN: False}


def test_changes_get_so_much_more_noise_that_with_the_count_it_is_what_was_asked_for():
    """z_delta^-2 + (2 sigma_b)^-2 = z^-2; a count with too little noise is refused. The noise of the count is its own."""
    terms = terms_of(noise_multiplier=1.0, quantile=0.5, quantile_noise=2.0)
    assert terms.multiplier**-2 + (2 * 2.0) ** -2 == pytest.approx(1.0)
    assert terms_of(expected=100, noise_multiplier=1.0, quantile=0.5).counting == 5.0
    assert terms_of(expected=4, noise_multiplier=1.0, quantile=0.5).counting == 1.0
    assert terms_of(noise_multiplier=1.3).multiplier == 1.3
    with pytest.raises(ValueError, match=r"privacy\.quantile_noise: 0\.5 alone gives away more"):
        terms_of(noise_multiplier=1.0, quantile=0.5, quantile_noise=0.5)
    state = leaves(0)
    moves = []
    server, method = server_of(state), protected(terms, Method())
    for number in range(200):
        server.round, server.state = number, Bundle(trees={"shared": state})
        method.absorb(method, server, iter([]))
        moves.append(math.log(server.state.facts[CLIP]))
    spread = torch.tensor(moves).double() / (0.2 * 2.0 / 4)
    assert abs(float(spread.var()) - 1) < 5 * (2 / 200) ** 0.5


def test_more_shares_than_clients_are_refused():
    with pytest.raises(ValueError, match=r"privacy\.least: 9 replies are needed, and a round asks 4 clients"):
        terms_of(where="clients", least=9)
