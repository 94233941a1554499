"""Clients that clip, noise and mask: what their sum is, what it is worth, and what the coordinator gets of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from fedgraft import seeds
from fedgraft.bundle import Bundle
from fedgraft.transforms.client_privacy import norm_of, share_within
from fedgraft.transforms.noise import Noise, seeded
from fedgraft.transforms.privacy import ClientPrivacy, ExamplePrivacy
from fedgraft.transforms.secure_aggregation.contribution import FINEST, TAIL, Contribution
from fedgraft.transforms.secure_aggregation.settings import KEYS, SHARES, TRAIN, UNMASK, SecAggPlus, check_clients, threshold_of
from fedgraft.transforms.secure_aggregation.vector import flattened, of_leaves, rounded
from fedgraft.tree import raw_bytes, subtract
from tests.strategies import given
from tests.transforms.secure import NAMES, Cohort, cohort
from tests.transforms.test_secure_aggregation import SIGMAS, changed, correlation, flat, uniform

LARGE = {"layers.0.attention.q.A": (64, 256)}
"""Many numbers, by which the variance of a single sum is known well."""
SHARED = Contribution(clip=0.05, noise_multiplier=1.5, least=3)
TRUSTING = Contribution(clip=0.05)


def noise_in_steps(group: Cohort, client: str, steps: np.ndarray, number: int = 0) -> np.ndarray:
    """A client's share of the noise, by the streams that are stated."""
    own = group.contribution
    variance = math.ceil((own.noise_multiplier * own.clip / group.settings.step) ** 2 / own.least) if own.least else 0
    return seeded(0, "client", client).whole(len(steps), variance, "share", number) if variance else np.zeros_like(steps)


def plain_steps(group: Cohort, client: str, number: int = 0) -> np.ndarray:
    """A client's clipped change as it is rounded."""
    change = flattened(subtract(group.trained(client, number), group.start(number)))
    step, clip = group.settings.step, group.contribution.clip - group.settings.step * (math.sqrt(len(change)) + 1)
    rng = seeds.numpy_rng(0, "secure_aggregation.rounding", number, client)
    return rounded(change * share_within(float(np.linalg.norm(change)), clip), group.settings, rng), step


def opened(group: Cohort, names: list[str], number: int = 0) -> np.ndarray:
    """What a round has changed, times how many clients: the sum, in steps."""
    reply = group.round(number)
    assert reply is not None
    assert reply.facts == {"examples": len(names), "clients": len(names)}, "all weigh the same"
    return flattened(subtract(reply.tree("shared"), group.start(number))) * len(names) / group.settings.step


@pytest.mark.parametrize("contribution", [SHARED, TRUSTING])
@pytest.mark.parametrize("gone", [None, "bo"])
def test_a_sum_is_that_of_clipped_changes_and_shares_of_the_noise(tmp_path, contribution, gone):
    """To the last step, with the noise of those that are in it; and without noise within a step a client of the sum in float64."""
    group = cohort(tmp_path, 5, lambda question, client: "down" if (question, client) == (TRAIN, gone) else "", contribution)
    names = [name for name in NAMES[:5] if name != gone]
    plain = {name: plain_steps(group, name)[0] for name in names}
    found = opened(group, names)
    noise = sum(noise_in_steps(group, name, plain[name]) for name in names)
    np.testing.assert_allclose(found, sum(plain.values()) + noise, rtol=0, atol=1e-4)
    changes = [flattened(subtract(group.trained(name), group.start())) for name in names]
    exact = sum(change * share_within(float(np.linalg.norm(change)), contribution.clip) for change in changes)
    taken = math.sqrt(len(exact)) + 1  # by which a change is shortened, in steps
    assert np.abs((found - noise) - exact / group.settings.step).max() < len(names) * (1 + taken)


@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([1, 8, 300]),
    scale=st.sampled_from([1e-4, 0.05, 30.0]),
    bits=st.sampled_from([10, 16, 32]),
    max_examples=60,
)
def test_whole_numbers_are_within_the_clip_however_they_are_rounded(seed, size, scale, bits):
    """The worst rounding, each number away from zero; and no shorter than need be."""
    settings, own = SecAggPlus(quantisation_bits=bits, clipping_range=0.02), Contribution(clip=0.1)
    change = np.random.default_rng(seed).standard_normal(size) * scale

    class Away:
        def random(self, count):
            return np.where(change > 0, 1 - 2.0**-53, 0.0)

    shortened = own.shortened(change, settings.step)
    steps = rounded(shortened, settings, Away())
    assert (np.abs(steps) >= np.abs(shortened / settings.step) - 1e-3).all()
    assert sum(int(number) ** 2 for number in steps) <= (own.clip / settings.step) ** 2
    longest = own.clip - (math.sqrt(size) + 1) * settings.step
    assert float(np.linalg.norm(shortened)) == pytest.approx(min(float(np.linalg.norm(change)), longest), rel=1e-12)
    assert own.largest(settings.step, 1) >= np.abs(steps).max()


def test_the_noise_of_a_sum_is_what_epsilon_is_computed_from_or_more(tmp_path):
    """(z clip)^2 with `least` survivors and more with more: k / least of it. 2 rounds of 16384 numbers, within 5 sqrt(2 / n)."""
    whole = (SHARED.noise_multiplier * SHARED.clip) ** 2
    for survivors in (3, 5):
        fate = lambda question, client, survivors=survivors: "" if client in NAMES[:survivors] or question in {KEYS, SHARES} else "down"  # noqa: E731
        group = cohort(tmp_path / str(survivors), 5, fate, SHARED, LARGE, threshold=3)
        found = []
        for number in range(2):
            plain = sum(plain_steps(group, name, number)[0] for name in NAMES[:survivors])
            found.append((opened(group, list(NAMES[:survivors]), number) - plain) * group.settings.step)
        numbers = np.concatenate(found)
        ratio = float((numbers**2).mean()) / whole
        assert abs(ratio / (survivors / 3) - 1) < 5 * (2 / len(numbers)) ** 0.5
        assert abs(float(np.corrcoef(found[0], found[1])[0, 1])) < 5 / math.sqrt(len(found[0])), "no two rounds share noise"


@given(clip=st.floats(1e-3, 1e2), z=st.floats(0.1, 50), least=st.integers(1, 100), step=st.floats(1e-9, 1e-5), max_examples=60)
def test_shares_are_never_too_small(clip, z, least, step):
    own = Contribution(clip=clip, noise_multiplier=z, least=least)
    assert least * own.variance(step) * step**2 >= (z * clip) ** 2 * (1 - 1e-12)
    assert least * own.variance(step) <= (z * clip / step) ** 2 * (1 + 1e-12) + least
    assert Contribution(clip=clip).variance(step) == 0


def test_fewer_than_least_stay_closed(tmp_path):
    """Three of five shares are the whole noise; with two the sum is opened for nobody, though two would be a majority of three."""
    down = {"ada", "bo", "cy"}
    group = cohort(tmp_path / "a", 5, lambda question, client: "down" if question == TRAIN and client in down else "", SHARED)
    assert group.round() is None
    assert "2 of 5 clients sent masked changes and 3 are needed" in group.warnings[-1]
    for least, threshold in ((1, 2), (2, 2), (3, 3)):
        assert threshold_of(SecAggPlus(), 3, least) == threshold
    group = cohort(tmp_path / "b", 3, lambda question, client: "down" if (question, client) == (TRAIN, "bo") else "", SHARED)
    assert group.rounds.threshold == 3
    assert group.round() is None


def test_a_client_shares_secrets_for_no_sum_that_lacks_noise(tmp_path):
    """Whatever the coordinator asks: a majority of four is three, and four have the whole noise."""
    own = Contribution(clip=0.05, noise_multiplier=1.0, least=4)
    group = cohort(tmp_path, 4, lambda question, client: "down" if question == SHARES else "", own)
    assert group.round() is None
    public = {name: reply.facts["public_keys"] for question, name, reply in group.received if question == KEYS}
    package = Bundle(facts={"round": 0, "threshold": 3, "public_keys": public})
    with pytest.raises(ValueError, match="sums of 3 clients would lack noise, of which 4 have shares"):
        group.answer(SHARES, "ada", package)
    assert set(group.answer(SHARES, "ada", changed(package, threshold=4)).facts) == {"sealed_shares", "commitment"}


def test_all_that_the_coordinator_gets_shows_no_single_client(tmp_path):
    """Vectors are uniform, with the change and with the noised change nothing in common; no count tells of anybody."""
    group = cohort(tmp_path, 4, lambda question, client: "late" if (question, client) == (TRAIN, "bo") else "", SHARED, LARGE)
    for number in range(2):
        assert group.round(number) is not None
    asked = [question for question, _, _ in group.received]
    assert {question: asked.count(question) for question in asked} == {KEYS: 8, SHARES: 8, TRAIN: 8, UNMASK: 6}
    for question, name, reply in group.received:
        content = reply.encode()
        for tree in (group.trained(name), group.change(name)):
            assert not any(raw_bytes(leaf)[:64] in content for leaf in tree.values())
        if question != TRAIN:
            assert not reply.trees
            continue
        assert set(reply.trees) == {"masked"}
        assert set(reply.facts) == {"loss", "masked_counts"}  # the loss is the harness's; `discreet` takes it away before
        vector = of_leaves(reply.tree("masked"), reply.facts["masked_counts"], group.settings)
        assert uniform(vector.words)
        plain = plain_steps(group, name)[0]
        assert correlation(vector.words, flat(group.change(name))) < SIGMAS
        assert correlation(vector.words, plain + noise_in_steps(group, name, plain)) < SIGMAS
        assert int(vector.counts[0]) > 1000


def test_how_many_numbers_were_cut_is_not_told_and_none_is(tmp_path):
    """Without privacy, numbers beyond the range are cut and counted; here the clip bounds them, and a count would tell of clients."""
    group = cohort(tmp_path / "private", 3, contribution=Contribution(clip=0.5), clipping_range=0.001)
    names = list(NAMES[:3])
    found = opened(group, names)
    assert np.abs(found).max() > group.settings.levels * 3
    np.testing.assert_allclose(found, sum(plain_steps(group, name)[0] for name in names), rtol=0, atol=1e-3)
    assert group.warnings == []
    plain = cohort(tmp_path / "plain", 3, clipping_range=0.001)
    assert plain.round() is not None
    assert "were cut to it" in plain.warnings[-1]


def test_a_round_that_is_done_again_gets_the_same_noise_and_other_numbers_get_other(tmp_path):
    own = Contribution(clip=1.0, noise_multiplier=1.0, least=2, noise_of=lambda client: Noise(client.encode()))
    one, other = np.arange(50), np.arange(50) + 1
    first = own.noised(one, 1e-3, "ada", 0) - one
    assert np.array_equal(own.noised(one, 1e-3, "ada", 0) - one, first)
    for numbers, client, number in ((other, "ada", 0), (one, "bo", 0), (one, "ada", 1)):
        assert not np.array_equal(own.noised(numbers, 1e-3, client, number) - numbers, first)


# what is refused before training


@pytest.mark.parametrize(
    ("settings", "contribution", "reason"),
    [
        (
            {"threshold": 3},
            {"least": 4},
            r"secure_aggregation\.threshold: a sum of 3 clients would lack noise, of which privacy\.least is 4",
        ),
        ({"neighbours": 2}, {"least": 4}, r"privacy\.least: 4 shares of the noise are needed, and a sum may be of 3 clients"),
        ({}, {"least": 6}, r"privacy\.least: 6 shares .* 5 clients"),
        ({}, {"clip": 1e4}, r"secure_aggregation\.modulus_bits: sums of 5 clients' clipped changes and noise take up to \d\d bits"),
        ({"quantisation_bits": 4}, {}, r"secure_aggregation\.quantisation_bits: a step of 0\.014 is too coarse for privacy\.clip 0\.05"),
        ({}, {"noise_multiplier": 1e-4}, r"quantisation_bits: a step of 3\.1e-06 is too coarse .* need 7\.2e-07"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_what_would(tmp_path, settings, contribution, reason):
    own = {"clip": 0.05, "noise_multiplier": 1.0, "least": 3, **contribution}
    with pytest.raises(ValueError, match=reason):
        cohort(tmp_path, 5, contribution=Contribution(**own), **settings)


@given(clients=st.integers(2, 200), clip=st.floats(0.01, 10), z=st.floats(0, 20), max_examples=60)
def test_a_modulus_that_is_not_refused_holds_the_sum(clients, clip, z):
    """All clients at the clip in one number, and 12 deviations of the noise of all: beyond them once in 10^31."""
    settings, own = SecAggPlus(), Contribution(clip=clip, noise_multiplier=z, least=2)
    sum_ = clients * clip / settings.step + TAIL * math.sqrt(clients * own.variance(settings.step))
    try:
        check_clients(settings, clients, 0, own)
    except ValueError:
        assert sum_ > 2**30 * 0.99, "no more than one bit is spared"
    else:
        assert sum_ < 2**31


def test_a_client_makes_no_whole_numbers_that_are_too_coarse(tmp_path):
    """By itself, whatever the coordinator let pass."""
    group = cohort(tmp_path, 3, contribution=Contribution(clip=0.05), quantisation_bits=8)
    group.shapes = {"layers.0.attention.q.A": (8, 8)}  # planned were 15 numbers
    with pytest.raises(ValueError, match="too coarse"):
        group.round()


def test_noise_is_as_fine_as_the_theorem_wants_where_it_is_not_refused():
    own = Contribution(clip=0.05, noise_multiplier=1.0, least=3)
    coarsest = 0.05 / math.sqrt(3) / FINEST
    with pytest.raises(ValueError, match="too coarse"):
        own.check(coarsest * 1.01, 1)
    assert Contribution(clip=50.0, noise_multiplier=1e-3, least=3).variance(coarsest * 0.99) >= FINEST**2
    assert 10 * 1e9 * 1e6 * math.exp(-(math.pi**2) * FINEST**2) < 1e-50, "a billion numbers of a million clients"


def test_what_a_run_asks_for():
    assert Contribution.of(ExamplePrivacy()) is None
    assert Contribution.of(ClientPrivacy(clip=0.2)) == Contribution(clip=0.2)
    shared = ClientPrivacy(clip=0.2, where="clients", least=5, noise_multiplier=2.0)
    assert Contribution.of(shared) == Contribution(clip=0.2, noise_multiplier=2.0, least=5)


def test_the_norm_is_that_of_the_clip_without_masks():
    tree = {"a": torch.full((3, 4), 0.5), "b": torch.full((2,), -2.0)}
    assert norm_of(tree) == pytest.approx(float(np.linalg.norm(flattened({key: leaf.double() for key, leaf in tree.items()}))))
