"""Work that runs only while somebody waits for it."""

from __future__ import annotations

import threading

import pytest

from fedgraft.turns import Turns


def count(hand_over):
    total = 0
    for number in range(3):
        total += hand_over(number)
    return total


def test_values_go_back_and_forth_and_the_result_comes_last():
    turns, said = Turns(count, "test"), []
    turns.go_on(0)  # the first turn answers nothing
    for answer in (10, 20, 30):
        said.append(turns.said)
        turns.go_on(answer)
    assert (said, turns.said, turns.result()) == ([0, 1, 2], None, 60)
    turns.leave()


def test_only_one_runs_at_a_time():
    trace = []

    def work(name):
        def inner(hand_over):
            for number in range(2):
                trace.append((name, number))
                hand_over(number)

        return inner

    both = [Turns(work(name), "test") for name in "ab"]
    for _ in range(2):
        for turns in both:
            turns.go_on(None)
    for turns in both:
        turns.leave()
    assert trace == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_an_error_is_raised_where_it_is_waited_for():
    def fails(hand_over):
        hand_over("once")
        raise ValueError("in the thread")

    turns = Turns(fails, "test")
    turns.go_on(None)
    with pytest.raises(ValueError, match="in the thread"):
        turns.go_on(None)
    turns.leave()


@pytest.mark.parametrize("begun", [False, True])
def test_leaving_ends_the_thread_and_unwinds_its_work(begun):
    closed, before = [], threading.active_count()

    def work(hand_over):
        try:
            hand_over(1)
        finally:
            closed.append(True)

    turns = Turns(work, "test")
    if begun:
        turns.go_on(None)
    turns.leave()
    assert threading.active_count() == before
    assert closed == [True] * begun
