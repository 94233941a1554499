"""Masked sums: they are the plain sums, survive who drops out, and tell of nobody."""

from __future__ import annotations

import base64
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from fedgraft import plugins, seeds
from fedgraft.bundle import Bundle
from fedgraft.recipe import load_recipe
from fedgraft.training.fit import NotFiniteError
from fedgraft.transforms.secure_aggregation.client import masked_questions, paired
from fedgraft.transforms.secure_aggregation.primitives import agreed, join, private_of, public_of, split, unseal
from fedgraft.transforms.secure_aggregation.settings import (
    KEYS,
    SHARES,
    TRAIN,
    UNMASK,
    SecAggPlus,
    check_clients,
    neighbourhoods,
    shares_of,
    threshold_of,
)
from fedgraft.transforms.secure_aggregation.vector import Vector, as_leaves, mask, mean_change, of_leaves, quantised
from fedgraft.tree import raw_bytes, subtract
from tests.strategies import given
from tests.transforms.secure import NAMES, SHAPES, Cohort, One, cohort

QUESTIONS = (KEYS, SHARES, TRAIN, UNMASK)
SIGMAS = 7  # of a normal approximation: keys are truly random, so a bound must never fail by chance


def plain_sum(group: Cohort, names: list[str], number: int = 0) -> Vector:
    """What clients would send without masks, added up; rounding is a function of seed, round and name."""
    vectors = []
    for one in (one for one in group.clients if one.name in names):
        change = subtract(group.trained(one.name, number), group.start(number))
        rng = seeds.numpy_rng(0, "secure_aggregation.rounding", number, one.name)
        vectors.append(quantised(change, one.examples, group.settings, rng))
    total = vectors[0]
    for vector in vectors[1:]:
        total += vector
    return total


def assert_is_mean_of(reply: Bundle, group: Cohort, names: list[str], number: int = 0) -> None:
    """Exactly the sum of what was quantised; within a step of the weighted mean in float64."""
    weights = {one.name: one.examples for one in group.clients if one.name in names}
    assert reply.facts["examples"] == sum(weights.values())
    change = mean_change(plain_sum(group, names, number), group.shapes, group.settings)
    for key, leaf in reply.tree("shared").items():
        start = group.start(number)[key].double()
        assert torch.equal(leaf, start + change[key])
        limit = group.settings.clipping_range
        parts = [(group.trained(name, number)[key].double() - start).clamp(-limit, limit) * weight for name, weight in weights.items()]
        assert ((leaf - start) - sum(parts) / sum(weights.values())).abs().max() <= group.settings.step * (1 + 1e-9)


@given(
    count=st.integers(3, 8),
    neighbours=st.sampled_from([None, 2, 4]),
    bits=st.sampled_from([(8, 32), (16, 32), (24, 64), (32, 64)]),
    fates=st.dictionaries(st.sampled_from(NAMES), st.tuples(st.sampled_from(QUESTIONS), st.sampled_from(["down", "late"])), max_size=4),
    max_examples=15,
)
def test_a_sum_is_the_plain_one_or_stays_closed(count, neighbours, bits, fates):
    """Drop-outs anywhere; whether enough are left is reckoned here from the graph, client by client."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"neighbours": neighbours, "quantisation_bits": bits[0], "modulus_bits": bits[1]}
        group = cohort(
            Path(folder),
            count,
            lambda question, client: fates.get(client, ("", ""))[1] * (fates.get(client, "")[:1] == (question,)),
            **settings,
        )
        reply = group.round()
        names = [one.name for one in group.clients]
        near = neighbourhoods(group.settings, names, 0, 0)

        def there(after: int) -> set[str]:
            return {name for name in names if name not in fates or QUESTIONS.index(fates[name][0]) > after}

        opens = bool(there(3)) and all(
            len(near[name] & there(stage)) >= group.rounds.threshold for stage in range(4) for name in there(min(stage, 1))
        )
        assert (reply is not None) == opens
        if reply is None:
            assert "no sum is opened" in group.warnings[-1]
        else:
            assert_is_mean_of(reply, group, sorted(there(2)))


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("fate", ["down", "late"])
def test_as_many_as_stated_may_drop_out_and_one_more_closes_the_sum(tmp_path, question, fate):
    """Five clients, three shares needed: two may be gone at any stage."""
    two, three = {"bo", "ed"}, {"ada", "bo", "ed"}
    for gone in (two, three):
        group = cohort(tmp_path / str(len(gone)), 5, lambda asked, client, gone=gone: fate if asked == question and client in gone else "")
        reply = group.round()
        if gone == three:
            assert reply is None
            said = group.warnings[-1]
            assert "2 of 5 clients" in said
            assert "3 are needed" in said
            assert said.endswith("missing: ada, bo, ed. The shared leaves stay as they are")
            assert group.rounds.unopened in said
        else:
            assert reply is not None
            assert group.rounds.unopened == ""
            late_helpers = question == UNMASK
            assert_is_mean_of(reply, group, list(NAMES[:5]) if late_helpers else ["ada", "cy", "di"])


def test_rounds_follow_each_other_with_new_keys_and_no_secret_outlasts_one(tmp_path):
    group = cohort(tmp_path, 3)
    for number in range(2):
        reply = group.round(number)
        assert reply is not None
        assert_is_mean_of(reply, group, list(NAMES[:3]), number)
    keys = [reply.facts["public_keys"] for question, _, reply in group.received if question == KEYS]
    assert len({key for pair in keys for key in pair}) == 12
    for path in tmp_path.rglob("*.json"):
        assert json.loads(path.read_text()) == {"opened": {"round": 1, "sent": ["ada", "bo", "cy"]}}


def test_a_client_that_dropped_out_forgets_its_secrets_with_the_next_question(tmp_path):
    group = cohort(tmp_path, 4, lambda question, client: "down" if (question, client) == (TRAIN, "bo") else "")
    assert group.round() is not None
    path = tmp_path / "secure-aggregation" / "bo.json"
    assert "private" in json.loads(path.read_text())
    asked = masked_questions(
        group.settings, {"train": group.train, "evaluate": lambda client, package: Bundle()}, lambda rows: rows, tmp_path
    )
    asked["evaluate"](One("bo", 2), Bundle())  # type: ignore[arg-type]
    assert json.loads(path.read_text()) == {}


# what a coordinator that is curious finds in what it gets


def uniform(words: np.ndarray) -> bool:
    """Chi-square of the bytes against a flat histogram, 255 degrees of freedom."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    statistic = ((counts - expected) ** 2 / expected).sum()
    return bool(abs(statistic - 255) < SIGMAS * np.sqrt(2 * 255))


def correlation(words: np.ndarray, change: np.ndarray) -> float:
    return float(abs(np.corrcoef(words.view(np.int32).astype(float), change)[0, 1]) * np.sqrt(len(change)))


def flat(tree: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([tree[key].flatten().double().numpy() for key in sorted(tree)])


@pytest.fixture
def watched(tmp_path):
    """A round of four with larger leaves, in which `bo` sends its vector too late, and all that was received."""
    group = cohort(tmp_path, 4, lambda question, client: "late" if (question, client) == (TRAIN, "bo") else "")
    group.shapes = {"layers.0.attention.q.A": (64, 256)}
    reply = group.round()
    assert reply is not None
    assert_is_mean_of(reply, group, ["ada", "cy", "di"])
    return group


def test_nothing_that_is_received_is_or_resembles_a_clients_change(watched):
    vectors = {}
    for question, name, reply in watched.received:
        content = reply.encode()
        for tree in (watched.trained(name), watched.change(name)):
            for leaf in tree.values():
                assert raw_bytes(leaf)[:64] not in content
        if question != TRAIN:
            assert not reply.trees
            continue
        assert set(reply.trees) == {"masked"}
        assert "examples" not in reply.facts
        vectors[name] = of_leaves(reply.tree("masked"), reply.facts["masked_counts"], watched.settings)
        assert uniform(vectors[name].words)
        assert correlation(vectors[name].words, flat(watched.change(name))) < SIGMAS
        assert int(vectors[name].counts[0]) > 1000  # the weights 1 to 4 are masked as well
    total = vectors["ada"] + vectors["cy"] + vectors["di"]
    assert uniform(total.words)  # as long as nobody has opened it


def test_what_is_opened_takes_off_one_mask_of_two_and_never_both(watched):
    """The coordinator recovers seeds of those in the sum and the key of the one that is not; what remains on each vector is uniform."""
    settings, size = watched.settings, 64 * 256
    by_question = {question: {name: reply for asked, name, reply in watched.received if asked == question} for question in QUESTIONS}
    opened = {name: reply.facts["opened_shares"] for name, reply in by_question[UNMASK].items()}
    secrets = {owner: join([opened[name][owner] for name in ("ada", "cy", "di")]) for owner in ("ada", "bo", "cy", "di")}
    for name, reply in by_question[TRAIN].items():
        vector = of_leaves(reply.tree("masked"), reply.facts["masked_counts"], settings)
        if name == "bo":  # its pairwise masks can be taken off; that of its own seed, of which nobody has opened a share, cannot
            for other in ("ada", "cy", "di"):
                public = by_question[KEYS][other].facts["public_keys"][0]
                pair = paired(
                    Vector(words=np.zeros(size, np.uint32), counts=np.zeros(2, np.uint64)),
                    "bo",
                    other,
                    agreed(private_of(secrets["bo"]), public),
                    settings,
                )
                vector -= pair
        else:
            vector -= mask(secrets[name], size, settings)
        assert uniform(vector.words)
        assert correlation(vector.words, flat(watched.change(name))) < SIGMAS


def test_the_last_masks_are_what_hides_a_change(watched):
    """The tests above can fail: with the seed of `bo` as well, its vector is its quantised change."""
    plain = plain_sum(watched, ["bo"])
    assert not uniform(plain.words)
    assert correlation(plain.words, flat(watched.change("bo"))) > SIGMAS


def test_what_passes_through_the_coordinator_is_sealed(watched):
    """Shares on their way are opened by the key of whom they are for, and by none that the coordinator comes to know."""
    public = {name: reply.facts["public_keys"] for question, name, reply in watched.received if question == KEYS}
    opened = {name: reply.facts["opened_shares"] for question, name, reply in watched.received if question == UNMASK}
    known = private_of(join([shares["bo"] for shares in opened.values()]))  # of the masks of `bo`, which dropped out
    assert public_of(known) == public["bo"][0]
    for question, name, reply in watched.received:
        for other, sealed in reply.facts["sealed_shares"].items() if question == SHARES else ():
            assert b"seed" not in base64.urlsafe_b64decode(sealed)
            for key in (public[name][1], public[other][1]):
                with pytest.raises(ValueError, match="cannot be opened"):
                    unseal(agreed(known, key), sealed)


def test_a_round_without_clients_is_no_sum_and_no_failure(tmp_path):
    group = cohort(tmp_path, 3)
    assert list(group.rounds.ask("train", {})) == []
    assert (group.warnings, group.rounds.unopened) == ([], "")


# what a client refuses


@pytest.fixture
def unmasking(tmp_path):
    """(a group whose clients have sent masked vectors, the packages that would open their sum)."""
    group, packages = cohort(tmp_path, 4), {}

    def stop(question, client):
        if question == UNMASK:
            packages[client] = True
            return "down"
        return ""

    group.fate = stop
    assert group.round() is None
    round_ = {}
    ask = group.ask

    def catch(question, asked):
        round_.update(asked if question == UNMASK else {})
        return ask(question, asked)

    group.rounds.engine = type("Engine", (), {"ask": staticmethod(catch)})()
    assert group.round() is None
    return group, round_


def changed(package: Bundle, **facts) -> Bundle:
    return Bundle(trees=package.trees, facts={**package.facts, **facts})


def test_a_client_opens_one_share_of_each_and_never_twice(unmasking):
    group, packages = unmasking
    package = packages["ada"]
    assert package.facts["sent"] == ["ada", "bo", "cy", "di"]
    refused = [
        ("both shares of bo", {"dropped": ["bo"]}),
        ("both shares of ada", {"dropped": ["ada"]}),
        ("too few clients, or of others", {"sent": ["ada", "bo", "cy"]}),  # di is neither
        ("too few clients, or of others", {"sent": ["ada", "bo"], "dropped": ["cy", "di"]}),
        ("too few clients, or of others", {"sent": ["bo", "cy", "di"], "dropped": ["ada"]}),
        ("too few clients, or of others", {"sent": ["ada", "bo", "cy", "di", "ed"]}),
        ("cannot be opened", {"sealed_shares": {}}),
        ("not where this question comes", {"round": 1}),
    ]
    for reason, facts in refused:
        with pytest.raises(ValueError, match=reason):
            group.answer(UNMASK, "ada", changed(package, **facts))
    opened = group.answer(UNMASK, "ada", package).facts["opened_shares"]
    assert set(opened) == {"ada", "bo", "cy", "di"}
    with pytest.raises(ValueError, match="secrets serve once"):
        group.answer(UNMASK, "ada", package)
    with pytest.raises(ValueError, match="secrets serve once"):
        group.answer(UNMASK, "ada", changed(package, sent=["ada", "cy", "di"], dropped=["bo"]))


def test_sealed_shares_of_others_or_of_another_client_are_refused(unmasking):
    group, packages = unmasking
    shares = packages["ada"].facts["sealed_shares"]
    with pytest.raises(ValueError, match="cannot be opened"):
        group.answer(UNMASK, "ada", changed(packages["ada"], sealed_shares={**shares, "bo": shares["cy"]}))


def test_nothing_is_masked_twice_with_the_same_secrets(unmasking):
    group, _ = unmasking
    _, _, package = next(one for one in reversed(group.sent) if one[:2] == (TRAIN, "ada"))
    with pytest.raises(ValueError, match="secrets serve once"):
        group.answer(TRAIN, "ada", package)


def test_a_second_sum_of_a_round_is_opened_for_the_same_clients_alone(tmp_path):
    """As after a crash before the commit: with other clients, the difference of two sums would be one client's change."""
    group = cohort(tmp_path, 4)
    first = group.round()
    second = group.round()
    assert first is not None
    assert second is not None
    for key in SHAPES:
        assert torch.equal(first.tree("shared")[key], second.tree("shared")[key])
    group.fate = lambda question, client: "down" if (question, client) == (TRAIN, "bo") else ""
    with pytest.raises(ValueError, match="another sum of this round was opened"):
        group.round()
    group.fate = lambda question, client: ""
    assert group.round(1) is not None


def test_keys_that_were_exchanged_and_thresholds_without_a_majority_are_refused(tmp_path):
    group = cohort(tmp_path, 4, lambda question, client: "down" if question == SHARES else "")
    assert group.round() is None
    public = {name: reply.facts["public_keys"] for question, name, reply in group.received if question == KEYS}
    package = Bundle(facts={"round": 0, "threshold": 3, "public_keys": public})
    for reason, facts in [
        ("own public keys were changed", {"public_keys": {**public, "ada": public["bo"]}}),
        ("have the same ones", {"public_keys": {**public, "cy": public["bo"]}}),
        ("have the same ones", {"public_keys": {**public, "cy": ["one"]}}),
        ("threshold of 2", {"threshold": 2}),
        ("threshold of 5", {"threshold": 5}),
    ]:
        with pytest.raises(ValueError, match=reason):
            group.answer(SHARES, "ada", changed(package, **facts))
    assert set(group.answer(SHARES, "ada", package).facts) == {"sealed_shares", "commitment"}
    with pytest.raises(ValueError, match="fewer than agreed, or others"):
        group.answer(TRAIN, "ada", Bundle(trees={"shared": group.start()}, facts={"round": 0, "peers": ["bo"]}))
    with pytest.raises(ValueError, match="fewer than agreed, or others"):
        group.answer(TRAIN, "ada", Bundle(trees={"shared": group.start()}, facts={"round": 0, "peers": ["bo", "cy", "ed"]}))


def test_numbers_that_are_not_finite_are_found_before_they_are_hidden(tmp_path):
    group = cohort(tmp_path, 3)
    group.trained = lambda client, number=0: {key: torch.full(shape, torch.nan) for key, shape in SHAPES.items()}  # type: ignore[method-assign]
    with pytest.raises(NotFiniteError, match="client 'ada': leaf"):
        group.round()


# wrong shares, on their way or from a client, close the sum


@pytest.mark.parametrize("liars", [{"ada"}, set(NAMES)])
@pytest.mark.parametrize(("gone", "why"), [(None, "secret"), ("bo", "key")])
def test_shares_that_do_not_fit_close_the_sum(tmp_path, gone, why, liars):
    """One share that is wrong makes no secret at all, but for chance; those of another secret make that one."""
    group = cohort(tmp_path, 3, lambda question, client: "late" if (question, client) == (TRAIN, gone) else "")
    answer, owner = group.answer, gone or "cy"
    wrong = dict(zip(NAMES, split(b"0" * (48 if gone else 32), 2, 3), strict=False))

    def lying(question, client, package):
        reply = answer(question, client, package)
        if question == UNMASK and client in liars:
            return changed(reply, opened_shares={**reply.facts["opened_shares"], owner: wrong[client]})
        return reply

    group.answer = lying  # type: ignore[method-assign]
    assert group.round() is None
    assert f"the shares of client '{owner}'" in group.warnings[-1]
    assert f"do not fit its {why}" in group.warnings[-1] or len(liars) == 1


@pytest.mark.parametrize(
    ("question", "facts"),
    [
        (TRAIN, {"masked_counts": [-1, 0]}),
        (TRAIN, {"masked_counts": [1]}),
        (KEYS, {"public_keys": ["one"]}),
        (KEYS, {"public_keys": [1, 2]}),
    ],
)
def test_what_is_no_count_or_key_makes_a_reply_a_lost_one(tmp_path, question, facts):
    group = cohort(tmp_path, 4)
    answer = group.answer

    def lying(asked, client, package):
        reply = answer(asked, client, package)
        return changed(reply, **facts) if (asked, client) == (question, "bo") else reply

    group.answer = lying  # type: ignore[method-assign]
    reply = group.round()
    assert reply is not None
    assert_is_mean_of(reply, group, ["ada", "cy", "di"])
    assert group.warnings == [f"the reply of client 'bo' can't be used: its '{next(iter(facts))}' are none"]


# numbers


@given(seed=st.integers(0, 2**32), weight=st.integers(1, 1000), bits=st.integers(2, 16))
def test_rounding_is_within_a_step_and_right_in_the_mean(seed, weight, bits):
    settings = SecAggPlus(quantisation_bits=bits, clipping_range=0.5)
    value = torch.rand(1, generator=torch.Generator().manual_seed(seed)).double() - 0.5
    vector = quantised({"layers.0.x": value.expand(4000)}, weight, settings, np.random.default_rng(seed))
    found = vector.words.view(np.int32) / weight * settings.step
    assert np.abs(found - float(value)).max() <= settings.step * (1 + 1e-9)
    assert abs(found.mean() - float(value)) <= SIGMAS * settings.step / 2 / np.sqrt(4000)
    assert vector.counts.tolist() == [weight, 0]


def test_what_is_beyond_the_range_is_cut_counted_and_told(tmp_path):
    group = cohort(tmp_path, 3, clipping_range=0.01)
    reply = group.round()
    assert reply is not None
    assert_is_mean_of(reply, group, list(NAMES[:3]))
    (said,) = group.warnings
    assert "changed by more than secure_aggregation.clipping_range (0.01)" in said


@pytest.mark.parametrize("modulus", [32, 64])
def test_leaves_and_vectors_are_inverses_and_masks_cancel(modulus):
    settings = SecAggPlus(modulus_bits=modulus)
    vector = mask(b"k" * 32, 20, settings)
    leaves = as_leaves(vector, SHAPES, settings)
    assert {key: tuple(leaf.shape) for key, leaf in leaves.items()} == SHAPES
    again = of_leaves(leaves, vector.counts.tolist(), settings)
    assert np.array_equal(again.words, vector.words)
    both = paired(paired(vector, "ada", "bo", b"p" * 32, settings), "bo", "ada", b"p" * 32, settings)
    assert np.array_equal(both.words, vector.words)
    assert np.array_equal(both.counts, vector.counts)


def test_a_mask_is_the_key_stream_of_the_whole_key():
    """ChaCha20 with a zero key, counter and nonce (RFC 8439, A.1, test vector 1)."""
    assert mask(bytes(32), 2, SecAggPlus()).words.astype("<u4").tobytes().hex() == "76b8e0ada0f13d90"
    ones = [mask(bytes(at) + b"\x01" + bytes(31 - at), 2, SecAggPlus()).words.tolist() for at in range(32)]
    assert len(set(map(tuple, ones))) == 32


# settings


@pytest.mark.parametrize("method", plugins.names("method"))
def test_each_method_bears_secure_aggregation_or_is_refused_with_a_reason(method):
    bears = {
        "apfl", "ditto", "fedadagrad", "fedadam", "fedavg", "fedavg_ft", "fedavgm", "feddpa", "fdlora", "fedper", "fedprox", "fedrep",
        "fedsa_lora", "fedyogi", "ffa_lora", "flex", "pfedme",
    }  # fmt: skip
    recipe = {"method": {"name": method}, "secure_aggregation": {"name": "secagg_plus"}}
    if method in bears:
        load_recipe(recipe)
        return
    with pytest.raises(ValueError, match="'secagg_plus' gives the coordinator a sum alone, and"):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"federation": {"merge": {"rule": "median"}}}, "needs each reply"),
        ({"federation": {"merge": {"rule": "norm_bounded"}}}, "needs each reply"),
        ({"compression": {"name": "int8"}}, "compression.name 'int8'"),
        ({"compression": {"name": "bf16"}}, "compression.name 'bf16'"),
        ({"compression": {"name": "low_rank"}}, "compression.name 'low_rank' makes numbers that cannot be summed"),
        ({"engine": {"keep_replies": True}}, "engine.keep_replies"),
        ({"method": {"name": "flex", "shared_graft": True}}, "method.shared_graft"),
    ],
)
def test_what_needs_single_replies_is_refused(sections, reason):
    with pytest.raises(ValueError, match=reason):
        load_recipe({"method": {"name": "fedavg"}, "secure_aggregation": {"name": "secagg_plus"}, **sections})


@pytest.mark.parametrize(
    ("settings", "sampled", "rows", "reason"),
    [
        ({}, 1, 10, "ask at least 2 clients"),
        ({"threshold": 2}, 4, 10, "between 3 and 4"),
        ({"threshold": 5}, 4, 10, "between 3 and 4"),
        ({"threshold": 5, "neighbours": 2}, 9, 10, "between 2 and 3"),
        ({}, 4, 65_539, "up to 33 bits"),
        ({"quantisation_bits": 24}, 4, 300, "modulus_bits"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(settings, sampled, rows, reason):
    with pytest.raises(ValueError, match=reason):
        check_clients(SecAggPlus(**settings), sampled, rows)


def test_numbers_that_just_fit_pass():
    check_clients(SecAggPlus(threshold=3), 4, 65_538)  # 65538 * 32767 < 2^31
    check_clients(SecAggPlus(threshold=4), 4, 10)
    check_clients(SecAggPlus(quantisation_bits=32, modulus_bits=64), 2, 2**31)


@given(count=st.integers(2, 12), half=st.integers(1, 5), number=st.integers(0, 5))
def test_neighbours_are_mutual_and_as_many_as_stated(count, half, number):
    settings, names = SecAggPlus(neighbours=2 * half), [str(at) for at in range(count)]
    near = neighbourhoods(settings, names, 0, number)
    assert all(len(group) == shares_of(settings, count) and name in group for name, group in near.items())
    assert all(name in near[other] for name, group in near.items() for other in group)
    assert shares_of(settings, count) / 2 < threshold_of(settings, count) <= max(2, shares_of(settings, count))
