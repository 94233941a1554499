"""A client's batches, its call of `fit`, and memories on disk."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import strategies as st

from fedgraft import seeds
from fedgraft.bundle import Bundle
from fedgraft.data.example import Example
from fedgraft.data.general_text import calibration_texts
from fedgraft.data.partition import ClientData
from fedgraft.data.settings import DataSettings
from fedgraft.selection.settings import SelectionSettings
from fedgraft.training.client import Client, MemoryStore
from fedgraft.training.fit import NotFiniteError, fit
from fedgraft.training.local_rules import plain as plain_rule
from fedgraft.training.settings import TrainingSettings
from fedgraft.tree import combine, equal
from tests.strategies import given


@pytest.fixture
def make_client(tiny_graft):
    """`make_client(rows, seed=0, model=..., **training settings)`: a client whose row i answers `i` in words of different lengths."""

    def build(rows=5, seed=0, name="ada", model=None, **training):
        train = [Example(str(i), "sum", f"say {i}", "", f"{i} " * (1 + i % 3)) for i in range(rows)]
        return Client(
            data=ClientData(name, train, [], []),
            model=model or tiny_graft("olmoe", dropout=0.1),
            seed=seed,
            data_settings=DataSettings(),
            training=TrainingSettings(**{"steps": 2, "batch_size": 2} | training),
            selection=SelectionSettings(),
        )

    return build


def texts(client, batch):
    return [client.model.base.tokenizer.decode(row[mask == 1]) for row, mask in zip(batch.ids, batch.mask, strict=True)]


def instructions(client, rounds):
    """Row numbers in the order they are trained on."""
    seen = []
    for number in rounds:
        for step in client.batches(number):
            seen += [int(text.split("say ")[1].split("<")[0]) for part in step for text in texts(client, part)]
    return seen


def test_batches_take_every_row_once_an_epoch(make_client):
    """2 steps of 2 rows a round: five rounds are four epochs of 5 rows, in different orders."""
    client = make_client()
    order = instructions(client, range(5))
    epochs = [order[start : start + 5] for start in range(0, 20, 5)]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 2, 3, 4]] * 4
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert instructions(client, [3]) == order[12:16]  # a round needs no earlier one


def test_batches_depend_on_seed_and_client(make_client):
    orders = [instructions(make_client(20, **options), range(5)) for options in ({}, {"seed": 1}, {"name": "bo"}, {})]
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize(("accumulation", "sizes"), [(1, [4]), (2, [2, 2]), (3, [2, 2]), (4, [1, 1, 1, 1]), (9, [1, 1, 1, 1])])
def test_accumulation_divides_a_step(make_client, accumulation, sizes):
    client = make_client(batch_size=4, accumulation=accumulation)
    steps = client.batches(0)
    assert [[len(part.ids) for part in step] for step in steps] == [sizes] * 2
    assert instructions(client, [0]) == instructions(make_client(batch_size=4), [0])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_grouped_by_length_a_round_has_the_same_rows_with_less_padding(make_client, accumulation):
    """Steps are those of all rows sorted by length; their order depends on the round."""
    options = {"steps": 6, "batch_size": 4, "accumulation": accumulation}
    plain, grouped = make_client(24, **options), make_client(24, group_by_length=True, **options)
    assert sorted(instructions(plain, [1])) == sorted(instructions(grouped, [1])) == list(range(24))
    steps = grouped.batches(1)
    assert [[len(part.ids) for part in step] for step in steps] == [[4 // accumulation] * accumulation] * 6
    rows = sorted(int(n) for step in plain.batches(1) for part in step for n in part.mask.sum(1))
    found = sorted(sorted(int(n) for part in step for n in part.mask.sum(1)) for step in steps)
    assert found == [rows[at : at + 4] for at in range(0, 24, 4)]
    lengths = [[int(step[0].mask[0].sum()) for step in grouped.batches(number)] for number in range(6)]
    assert len({tuple(each) for each in lengths}) > 1  # not always the shortest first
    assert instructions(grouped, [1]) == instructions(make_client(24, group_by_length=True, **options), [1])


def test_rows_are_prompt_and_response_of_the_template(make_client):
    client = make_client(1)
    ((batch,), _) = client.batches(0)
    assert texts(client, batch)[0] == "<|im_start|>user\nsay 0<|im_end|>\n<|im_start|>assistant\n0 <|im_end|>"
    assert client.model.base.tokenizer.decode(batch.labels[0][batch.labels[0] >= 0]) == "0 <|im_end|>"


def test_generic_calibration_is_the_shipped_text_the_same_for_every_client(make_client):
    """Every document once, cut into rows; no word of the client's own."""
    found = []
    for name in ("ada", "bo"):
        client = make_client(name=name)
        client.selection = SelectionSettings(text="generic", tokens=100_000)
        found.append([text for batch in client.calibration() for text in texts(client, batch)])
    assert found[0] == found[1]
    assert sorted("".join(found[0])) == sorted("".join(calibration_texts()))
    assert not any("say" in text and "<|" in text for text in found[0])


def test_calibration_is_the_whole_text_once(make_client):
    client = make_client(20)
    seen = [text for batch in client.calibration() for text in texts(client, batch)]
    trained = [text for (batch,) in make_client(20, steps=10).batches(0) for text in texts(client, batch)]
    assert sorted(seen) == sorted(trained)


def test_calibration_takes_so_many_tokens_in_an_order_of_the_clients_own(make_client):
    """The rows of a smaller budget are among those of a larger one, but for the one that is cut; another client has others."""

    def taken(tokens, name="ada"):
        client = make_client(20, name=name)
        client.selection = SelectionSettings(tokens=tokens)
        batches = list(client.calibration())
        assert sum(batch.tokens for batch in batches) == tokens
        return Counter(text for batch in batches for text in texts(client, batch))

    few, more = taken(50), taken(95)
    assert sum((few - more).values()) <= 1
    assert few != taken(50, name="bo")


def test_fit_runs_this_rounds_batches_with_a_seed_of_its_own(make_client):
    client = make_client()
    client.remember(trees={}, facts={"experts": [[5], [2]]})
    start = combine(client.model.fresh_adapters(0), client.model.fresh_side([[5], [2]], 0))
    found = client.fit(start, round_number=3, lr=1e-3)
    seed = seeds.derive(0, "fit", 3, "ada")
    expected = fit(client.model, start, client.batches(3), client.training, lr=1e-3, seed=seed, experts=[[5], [2]])
    assert equal(found.tree, expected.tree)
    assert not equal(found.tree, client.fit(start, round_number=4, lr=1e-3).tree)


def test_not_finite_names_client_and_round_and_leaves_the_memory(make_client):
    client = make_client()
    client.memory = memory = Bundle(trees={"personal": {}}, facts={"experts": []})
    start = client.model.fresh_adapters(0)
    start["layers.0.attention.q.B"].fill_(math.inf)
    with pytest.raises(NotFiniteError, match=r"client 'ada', round 8: the loss became"):
        client.fit(start, round_number=7, lr=1e-3)
    assert client.memory is memory


def test_remember_replaces_what_is_named(make_client):
    client = make_client()
    one, two = {"layers.0.attention.q.A": torch.ones(1)}, {"layers.0.attention.q.A": torch.zeros(1)}
    client.remember(trees={"a": one, "b": one}, facts={"experts": [[1]], "n": 1})
    before = client.memory
    client.remember(trees={"b": two}, facts={"n": 2})
    assert client.memory.trees == {"a": one, "b": two}
    assert client.memory.facts == {"experts": [[1]], "n": 2}
    assert before.trees["b"] is one  # a memory in hand is not changed under its holder
    assert client.experts == [[1]]
    assert make_client().experts == []


def test_plain_rule_hands_on_kept_moments(make_client):
    """Two rounds through the memory equal two calls that pass AdamW's state by hand."""
    client = make_client(optimizer_state="kept")
    start = client.model.fresh_adapters(0)
    first = plain_rule(client, start, 0, 1e-3)
    client.remember(trees={f"moments.{name}": tree for name, tree in first.moments.items()})
    found = plain_rule(client, first.tree, 1, 1e-3)
    assert equal(found.tree, client.fit(first.tree, round_number=1, lr=1e-3, moments=first.moments).tree)
    assert not equal(found.tree, client.fit(first.tree, round_number=1, lr=1e-3).tree)


def memory(text):
    return Bundle(facts={"text": text})


def test_store_reads_the_newest_version_that_is_allowed(tmp_path):
    store = MemoryStore(tmp_path)
    assert store.load("ada", 9).facts == {}
    assert store.versions("ada") == []
    store.save("ada", 1, memory("one"), committed=0)
    store.save("ada", 4, memory("four"), committed=3)
    store.save("bo", 2, memory("other"), committed=1)
    assert [store.load("ada", at_most).facts.get("text") for at_most in range(6)] == [None, "one", "one", "one", "four", "four"]
    assert store.load("bo", 9).facts == {"text": "other"}
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors")) == [
        "ada/memory-0000001.safetensors",
        "ada/memory-0000004.safetensors",
        "bo/memory-0000002.safetensors",
    ]


def test_store_keeps_the_committed_version_beside_the_newest(tmp_path):
    store = MemoryStore(tmp_path)
    kept = []
    for version in range(1, 5):  # every ask is committed before the next
        store.save("ada", version, memory(str(version)), committed=version - 1)
        kept.append(store.versions("ada"))
    assert kept == [[1], [1, 2], [2, 3], [3, 4]]
    for version in (5, 6):  # a round of three asks, the first of which wrote 4 after a commit at 3
        store.save("ada", version, memory(str(version)), committed=3)
    assert store.versions("ada") == [3, 5, 6]  # 5, so that the ask that wrote 6 can be repeated


def test_store_after_a_crash_goes_back_to_the_commit(tmp_path):
    """Asks 0 to 2 committed; ask 3 wrote version 4 and the coordinator died; its successor asks again from version 3."""
    store = MemoryStore(tmp_path)
    for version in (1, 2, 3):
        store.save("ada", version, memory(str(version)), committed=version - 1)
    store.save("ada", 4, memory("lost"), committed=3)
    again = MemoryStore(tmp_path)
    assert again.load("ada", 3).facts == {"text": "3"}
    again.save("ada", 4, memory("again"), committed=3)
    assert again.versions("ada") == [3, 4]
    assert again.load("ada", 4).facts == {"text": "again"}


def test_store_drops_versions_of_a_future_that_did_not_happen(tmp_path):
    store = MemoryStore(tmp_path)
    store.save("ada", 3, memory("3"), committed=0)
    store.save("ada", 5, memory("of two asks in a round that was not committed"), committed=3)
    store.save("ada", 4, memory("4"), committed=3)
    assert store.versions("ada") == [3, 4]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12), max_examples=60)
def test_store_survives_any_history(tmp_path_factory, history):
    """Each ask reaches the client or not, and commits or crashes (then it is asked again); two variables are the twin."""
    folder = tmp_path_factory.mktemp("store")
    asked, known, ahead = 0, None, None
    for number, (reached, commits) in enumerate(history):
        store = MemoryStore(folder)
        assert store.load("ada", asked).facts.get("text") == known
        if reached:
            ahead = str(number)
            store.save("ada", asked + 1, memory(ahead), committed=asked)
        if commits:  # a try that crashed has written the memory too, for the same question
            asked, known, ahead = asked + 1, ahead or known, None
        assert len(store.versions("ada")) <= 2
    assert MemoryStore(folder).load("ada", asked).facts.get("text") == known


def test_a_damaged_memory_is_named(tmp_path):
    store = MemoryStore(tmp_path)
    store.save("ada", 1, memory("1"), committed=0)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"ada/memory-0000001.safetensors: damaged"):
        store.load("ada", 1)
