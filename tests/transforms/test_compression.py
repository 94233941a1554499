"""Coded changes: what they say, what they cost, and what is carried over."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import strategies as st

from fedgraft import plugins
from fedgraft.aggregation.server import Reply
from fedgraft.bundle import Bundle
from fedgraft.recipe import load_recipe
from fedgraft.report.progress import Quiet
from fedgraft.runner import resume
from fedgraft.runner import run as run_recipe
from fedgraft.training.client import Client
from fedgraft.transforms.codings import Bf16, Fp16, Int8, TopK
from fedgraft.transforms.compression import ERROR, compressed, restored, summary_lines
from fedgraft.transforms.low_rank import LowRank
from fedgraft.tree import equal, num_bytes
from fedgraft.words import size
from tests.contract.test_methods import StopAt
from tests.methods.harness import ROWS
from tests.strategies import given

KEY = "layers.0.attention.q.A"
KINDS = [Bf16(), Fp16(), Int8(), Int8(error_feedback=False), TopK(), TopK(share=1.0), TopK(error_feedback=False)]
KINDS += [LowRank(), LowRank(rank=3, error_feedback=False), LowRank(rank=9)]


class Memory:
    """A client that remembers and does nothing else."""

    def __init__(self):
        self.memory = Bundle()

    remember = Client.remember


def sent(settings, start, trained, client):
    """The coded reply to a package of `start`."""
    ask = compressed(settings, lambda client, package: Bundle(trees={"shared": {KEY: trained}}, facts={"examples": 3}))
    return ask(client, Bundle(trees={"shared": {KEY: start}}))


def heard(settings, reply, start):
    """(the leaves that the coordinator has of a reply, what it says of lost ones)."""
    lost, packages = [], {"ada": Bundle(trees={"shared": {KEY: start}})}
    replies = restored(settings, iter([Reply(client="ada", bundle=reply)]), packages, lambda client, reason: lost.append(reason))
    return [one.bundle.tree("shared")[KEY] for one in replies], lost


def leaf(seed, scale=1e-3):
    return torch.randn(6, 11, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("settings", KINDS, ids=repr)
@given(seed=st.integers(0, 2**32), rounds=st.integers(1, 5), scale=st.sampled_from([1e-6, 1e-2, 10.0]), max_examples=25)
def test_all_that_was_sent_is_the_sum_of_the_true_changes_but_for_the_last_error(settings, seed, rounds, scale):
    """Telescoping, through the codec; without feedback nothing is kept."""
    client, total, true = Memory(), torch.zeros(6, 11).double(), torch.zeros(6, 11).double()
    for number in range(rounds):
        start, trained = leaf(seed + 2 * number, scale), leaf(seed + 2 * number + 1, scale)
        reply = Bundle.decode(sent(settings, start, trained, client).encode())
        (whole,), lost = heard(settings, reply, start)
        assert not lost
        assert whole.dtype == torch.float64
        total += whole - start.double()
        true += trained.double() - start.double()
    assert (ERROR in client.memory.trees) == settings.feedback
    if settings.feedback:
        torch.testing.assert_close(total + client.memory.tree(ERROR)[KEY], true, rtol=0, atol=1e-14 + scale * 1e-13)


@given(seed=st.integers(0, 2**32), share=st.floats(0.01, 1.0))
def test_top_k_and_int8_are_their_brute_force_twins(seed, share):
    """Element by element in plain Python: largest first and ties to the first; the nearest of the multiples -127..127 of the scale."""
    change = leaf(seed).double().flatten()
    change[::7] = change[0]  # ties
    settings, values = TopK(share=share), change.tolist()
    kept = sorted(sorted(range(len(values)), key=lambda at: (-abs(values[at]), at))[: -int(-share * len(values) // 1)])
    parts = settings.code(change)
    assert parts["index"].tolist() == kept
    assert parts[""].tolist() == [float(torch.tensor(values[at], dtype=torch.float32)) for at in kept]
    coded = Int8().code(change)
    scale = float(coded["scale"])
    assert scale == pytest.approx(max(map(abs, values)) / 127)
    for value, step in zip(values, coded[""].tolist(), strict=True):
        best = min(range(-127, 128), key=lambda multiple: abs(value - multiple * scale))
        assert abs(value - step * scale) <= abs(value - best * scale) + 1e-15


@pytest.mark.parametrize("settings", KINDS, ids=repr)
def test_nothing_changed_is_nothing_sent_and_a_leaf_of_any_size_goes_through(settings):
    for shape in ((), (1,), (0, 3), (4, 5)):
        start = torch.ones(shape)
        (whole,), lost = heard(settings, sent(settings, start, start.clone(), Memory()), start)
        assert not lost
        assert torch.equal(whole, start.double())


@pytest.mark.parametrize(
    ("settings", "trees", "reason"),
    [
        (Int8(), {"shared": {KEY: torch.zeros(66, dtype=torch.int8)}}, "shared.scale': got nothing"),
        (Int8(), {"shared": {KEY: torch.zeros(66)}, "shared.scale": {KEY: torch.ones(1)}}, "got torch.float32"),
        (Int8(), {"shared": {KEY: torch.zeros(65, dtype=torch.int8)}, "shared.scale": {KEY: torch.ones(1)}}, r"\(65,\)"),
        (Int8(), {"shared.scale": {"layers.9.x": torch.ones(1)}}, "not asked for"),
        (TopK(share=0.02), {"shared": {KEY: torch.ones(2)}, "shared.index": {KEY: torch.tensor([1, 66]).int()}}, "do not ascend"),
        (TopK(share=0.02), {"shared": {KEY: torch.ones(2)}, "shared.index": {KEY: torch.tensor([-1, 6]).int()}}, "do not ascend"),
        (TopK(share=0.02), {"shared": {KEY: torch.ones(2)}, "shared.index": {KEY: torch.tensor([6, 6]).int()}}, "do not ascend"),
        (LowRank(), {"shared.left": {KEY: torch.ones(6, 2)}}, "shared.right': got nothing"),
        (
            LowRank(),
            {"shared.left": {KEY: torch.ones(6, 2)}, "shared.right": {KEY: torch.ones(11, 2)}},
            r"\(11, 2\) in place of .*\(2, 11\)",
        ),
        (LowRank(), {"shared.left": {KEY: torch.ones(6, 3)}, "shared.right": {KEY: torch.ones(3, 11)}}, r"\(6, 3\) in place of .*\(6, 2\)"),
        (LowRank(), {"shared.left": {KEY: torch.ones(6, 2).double()}, "shared.right": {KEY: torch.ones(2, 11)}}, "got torch.float64"),
        (LowRank(), {"shared": {KEY: torch.ones(66)}}, "'shared': got torch.float32 .* in place of nothing"),
        (LowRank(rank=9), {"shared.left": {KEY: torch.ones(6, 9)}, "shared.right": {KEY: torch.ones(9, 11)}}, "'shared': got nothing"),
        (LowRank(), {"shared.right": {"layers.9.x": torch.ones(2, 11)}}, "not asked for"),
    ],
)
def test_a_reply_that_cannot_be_decoded_is_lost_by_name(settings, trees, reason):
    found, lost = heard(settings, Bundle(trees=trees), leaf(0))
    assert not found
    assert len(lost) == 1
    assert "client 'ada'" in lost[0]
    assert re.search(reason, lost[0])


def digests(run):
    return json.loads((run.session.folder / "digest.json").read_text())


@pytest.mark.parametrize("method", plugins.names("method"))
def test_each_method_bears_compression_or_is_refused_with_a_reason(method):
    bears = {
        "apfl", "ditto", "fedadagrad", "fedadam", "fedavg", "fedavg_ft", "fedavgm", "feddpa", "fdlora", "fedper", "fedprox", "fedrep",
        "fedsa_lora", "fedyogi", "ffa_lora", "flex", "pfedme",
    }  # fmt: skip
    recipe = {"method": {"name": method}, "compression": {"name": "int8"}}
    if method in bears:
        load_recipe(recipe)
        return
    with pytest.raises(ValueError, match=f"compression.name: 'int8' .* method '{method}' (sends|merges)"):
        load_recipe(recipe)


@pytest.mark.parametrize("kind", ["bf16", "int8", "top_k", "low_rank"])
@pytest.mark.parametrize("method", ["flex", "ditto", "fedper"])
def test_a_run_counts_the_bytes_that_travel_and_leaves_personal_leaves_untouched(start, method, kind):
    """In the first round personal leaves are as without; what travels is the coded size, by hand."""
    usual = start(method, federation={"rounds": 1}).go()
    run = start(method, federation={"rounds": 1}, compression={"name": kind}).go()
    line = json.loads((run.session.folder / "rounds.jsonl").read_text())
    replies = [content for question, _, content in run.up if question == "train"]
    assert line["bytes_up"] == sum(map(len, replies))
    cost = {
        "bf16": lambda m, n: 2 * m * n,
        "int8": lambda m, n: m * n + 4,
        "top_k": lambda m, n: 8 * -(-m * n // 10),
        "low_rank": lambda m, n: 4 * 2 * (m + n),  # of pairs of rank 4
    }[kind]
    expected = sum(cost(*leaf.shape) for leaf in run.state.values())
    assert f"sent up as {kind}: {size(expected)}" in dict(summary_lines(run.session.recipe.compression, run.session.shapes))[""]
    for content in replies:
        assert sum(map(num_bytes, Bundle.decode(content).trees.values())) == expected
    for name in ROWS:
        assert equal(run.memory(name).tree("personal"), usual.memory(name).tree("personal"))
        assert equal(run.memory(name).tree("trained"), usual.memory(name).tree("trained"))
        assert set(run.memory(name).tree(ERROR)) == (set(run.state) if kind != "bf16" else set())
    assert not equal(run.state, usual.state)


def test_none_is_no_compression_and_all_of_top_k_is_nearly_so(start):
    plain, none, whole = (
        start("flex", **({"compression": one} if one else {})).go() for one in (None, {"name": "none"}, {"name": "top_k", "share": 1.0})
    )
    assert digests(plain) == digests(none)
    for key, leaf in plain.state.items():
        torch.testing.assert_close(whole.state[key], leaf, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "step"), [("int8", 2), ("int8", 3), ("low_rank", 3)])
def test_a_resumed_run_carries_its_errors_on_bit_for_bit(place, tmp_path, kind, step):
    """Stopped before and after a commit, with two of three clients a round."""
    recipe = place.recipe("flex", federation={"clients_per_round": 2}, compression={"name": kind})
    whole = run_recipe(recipe, out=tmp_path / "whole", progress=Quiet())
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, out=tmp_path / "stopped", progress=StopAt("training", step))
    resume(tmp_path / "stopped", progress=Quiet())
    assert (tmp_path / "stopped" / "digest.txt").read_text() == (whole.folder / "digest.txt").read_text()
