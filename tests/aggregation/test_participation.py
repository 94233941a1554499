"""Who takes part: a function of seed, round and client, as often as the settings say."""

from __future__ import annotations

import math

import pytest
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fedgraft.aggregation.merges import by_examples
from fedgraft.aggregation.participation import check, present, take_part
from fedgraft.aggregation.robust import MergeSettings
from fedgraft.aggregation.settings import FederationSettings
from fedgraft.training.settings import TrainingSettings
from tests.strategies import given

NAMES = ["d", "b", "a", "c", "e"]


def part(round_number=0, seed=0, steps=5, names=NAMES, **settings):
    return take_part(FederationSettings(**settings), names, seed, round_number, lambda number, client: steps)


def test_nobody_is_missing_unless_said_otherwise():
    found = part()
    assert (found.asked, found.dropped, found.late, found.seconds) == (NAMES, [], [], {})
    assert found.facts(unequal=False) == {}


@given(st.integers(0, 100), st.integers(0, 5), st.floats(0, 0.9), st.integers(1, 5))
def test_sampled_clients_are_asked_or_dropped_in_order(round_number, seed, dropout, wanted):
    settings = {"dropout": dropout, "clients_per_round": wanted}
    found, all_there = part(round_number, seed, **settings), part(round_number, seed, clients_per_round=wanted)
    assert sorted(found.asked + found.dropped) == sorted(all_there.asked)
    assert all(names == [name for name in NAMES if name in names] for names in (found.asked, found.dropped))
    assert found == part(round_number, seed, **settings)


def test_drop_outs_come_as_often_as_said():
    """0.3 of 5 x 2,000: 3,000 with a standard deviation of sqrt(10000 * 0.21) = 46; within 5 of them, and each client alike."""
    dropped = [name for number in range(2000) for name in part(number, dropout=0.3).dropped]
    assert abs(len(dropped) - 3000) < 230
    assert all(abs(dropped.count(name) - 600) < 5 * math.sqrt(2000 * 0.21) for name in NAMES)


def test_one_clients_fate_does_not_hang_on_the_others():
    """Streams derive from the client's name."""
    settings = {"dropout": 0.5, "deadline": 10.0, "jitter": 0.5}
    alone, among = part(3, names=["a"], **settings), part(3, **settings)
    assert alone.dropped == [name for name in among.dropped if name == "a"]
    assert alone.seconds.get("a") == among.seconds.get("a")


def test_simulated_time_is_steps_times_the_clients_pace():
    """Within the bounds, always the same for a client without jitter, log-uniform: half of many clients are below the geometric mean."""
    many = [f"c{number}" for number in range(400)]
    found = part(names=many, steps=5, deadline=20.0, step_seconds=(1.0, 16.0))
    assert all(5 <= seconds <= 80 for seconds in found.seconds.values())
    assert found.late == [name for name in many if found.seconds[name] > 20.0]
    assert abs(len(found.late) - 200) < 50  # 20 s are 5 steps of 4 s, the geometric mean; 5 deviations of 10
    assert part(9, names=many, steps=5, deadline=20.0, step_seconds=(1.0, 16.0)).seconds == found.seconds
    assert part(names=many, steps=10, deadline=20.0, step_seconds=(1.0, 16.0)).seconds["c0"] == pytest.approx(
        2 * found.seconds["c0"], abs=1e-5
    )
    shaken = part(9, names=many, steps=5, deadline=20.0, step_seconds=(1.0, 16.0), jitter=0.5)
    moves = [math.log(shaken.seconds[name] / found.seconds[name]) for name in many]
    assert math.sqrt(sum(move**2 for move in moves) / 400) == pytest.approx(0.5, abs=0.1)
    assert found.facts(unequal=False).keys() == {"seconds", "late"}
    assert found.facts(unequal=True)["steps"] == dict.fromkeys(many, 5)


def test_clients_join_in_their_round():
    settings = FederationSettings(join={"a": 2, "e": 4}, clients_per_round=4)
    assert [present(settings, NAMES, 0, number) for number in (0, 2, 4)] == [["d", "b", "c"], ["d", "b", "a", "c"], NAMES]
    assert part(0, join={"a": 2, "e": 4}, clients_per_round=4).asked == ["d", "b", "c"]
    many = [f"c{number}" for number in range(300)]
    spread = FederationSettings(join=2)
    growing = [len(present(spread, many, 0, number)) for number in range(3)]
    assert growing[2] == 300
    assert all(abs(count - 100 * (number + 1)) < 45 for number, count in enumerate(growing))  # a third each, deviation 8.2


def test_before_anybody_has_joined_nobody_is_asked():
    assert part(0, join=dict.fromkeys(NAMES, 1)).asked == []


def test_unequal_steps_are_between_the_bounds_and_all_equal_without():
    settings = TrainingSettings(steps=5, least_steps=2)
    drawn = [settings.steps_of(0, number, name) for number in range(200) for name in NAMES]
    assert set(drawn) == {2, 3, 4, 5}
    assert all(abs(drawn.count(steps) - 250) < 70 for steps in (2, 3, 4, 5))  # deviation 13.7
    assert {TrainingSettings(steps=5).steps_of(seed, number, "a") for seed in (0, 1) for number in range(20)} == {5}
    with pytest.raises(ValidationError, match="least_steps 6 is above steps 5; lower it, or raise steps"):
        TrainingSettings(steps=5, least_steps=6)


@pytest.mark.parametrize(
    ("merge", "sampled", "complaint"),
    [
        ({"rule": "krum", "faulty": 2}, None, "krum with these settings needs 7 replies, but a round asks 5 of 5 clients"),
        ({"rule": "krum", "faulty": 1}, 4, "krum with these settings needs 5 replies, but a round asks 4 of 5 clients"),
        ({"rule": "trimmed_mean", "trim": 0.1}, None, "trimmed_mean with these settings needs 10 replies"),
    ],
)
def test_a_merge_that_needs_more_clients_is_refused(merge, sampled, complaint):
    settings = FederationSettings(merge=merge, clients_per_round=sampled)
    with pytest.raises(ValueError, match=complaint):
        check(settings, NAMES, settings.merge.merge(by_examples))


def test_enough_clients_and_known_ones_are_fine():
    rule = TypeAdapter(MergeSettings).validate_python({"rule": "krum"})
    check(FederationSettings(merge=rule, join={"a": 1}), NAMES, rule.merge(by_examples))
    with pytest.raises(ValueError, match=r"federation\.join: there is no client 'ab' \(did you mean '[ab]'\?\); clients: d, b, a, c, e"):
        check(FederationSettings(join={"ab": 1}), NAMES, by_examples)


@pytest.mark.parametrize(
    "wrong", [{"dropout": 1}, {"deadline": 0}, {"step_seconds": (0, 1)}, {"jitter": -1}, {"join": -1}, {"join": {"a": -1}}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValidationError):
        FederationSettings(**wrong)


def test_poisson_samples_each_client_by_itself_as_often_as_said():
    """2 of 5: each with probability 0.4 whoever else is there, 2,000 rounds within 5 deviations; nobody now and then, 0.6^5 = 8 %."""
    settings = {"clients_per_round": 2, "sampling": "poisson"}
    rounds = [part(number, **settings).asked for number in range(2000)]
    for name in NAMES:
        assert abs(sum(name in asked for asked in rounds) - 800) < 5 * math.sqrt(2000 * 0.24)
    together = sum({"a", "b"} <= set(asked) for asked in rounds)
    assert abs(together - 320) < 5 * math.sqrt(2000 * 0.16 * 0.84)
    assert abs(sum(not asked for asked in rounds) - 2000 * 0.6**5) < 5 * math.sqrt(2000 * 0.6**5)
    assert all(asked == [name for name in NAMES if name in asked] for asked in rounds)


def test_a_poisson_sample_does_not_hang_on_who_has_joined():
    settings = {"clients_per_round": 2, "sampling": "poisson"}
    for number in range(50):
        late = part(number, join={"a": 10}, **settings).asked
        assert late == [name for name in part(number, **settings).asked if name != "a" or number >= 10]
    assert part(0, sampling="poisson").asked == NAMES, "without a number of clients everybody is in every round"
