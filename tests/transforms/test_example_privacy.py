"""DP-SGD: single gradients against a brute-force twin, samples, noise, whole runs, refusals."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st

from fedgraft import plugins
from fedgraft.bundle import Bundle
from fedgraft.recipe import load_recipe
from fedgraft.report.progress import Quiet
from fedgraft.report.record import Record
from fedgraft.runner import resume
from fedgraft.runner import run as run_recipe
from fedgraft.training.fit import _of_rows
from fedgraft.transforms.accountant import epsilon
from fedgraft.transforms.example_privacy import Gradients, Rows, by_rows
from fedgraft.transforms.noise import Noise, seeded
from fedgraft.transforms.privacy import ExamplePrivacy
from tests.contract.test_methods import StopAt
from tests.methods.harness import ROWS
from tests.strategies import given

pytest.importorskip("opacus", reason="extra privacy")

NOISED = {"name": "examples", "clip": 0.5, "noise_multiplier": 1.0}
GENERIC = {"selection": {"text": "generic"}}
BEARS = {
    "centralised", "fedadagrad", "fedadam", "fedavg", "fedavgm", "fedex_lora", "fedper", "fedprox", "fedsa_lora", "fedyogi", "ffa_lora",
    "flex", "flexlora", "flora", "hetlora", "local", "local_graft", "scaffold",
}  # fmt: skip


def leaves_of(shapes):
    return {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}


def gradients(expected=4.0, **options):
    return Gradients(settings=ExamplePrivacy(**{"noise_multiplier": 0.0, **options}), noise=seeded(0), expected=expected)


@given(seed=st.integers(0, 2**32), rows=st.integers(0, 5), clip=st.floats(0.05, 20))
def test_a_step_is_the_sum_of_clipped_row_gradients_over_the_expected_rows(seed, rows, clip):
    """Brute force; and one row more moves it by no more than clip / expected, whatever its gradient."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 2), "b": (4,)}
    drawn = [{name: torch.randn(shape, generator=rng) * 3 for name, shape in shapes.items()} for _ in range(rows + 1)]

    def step(of):
        found, leaves = gradients(clip=clip), leaves_of(shapes)
        for row in of:
            for name, leaf in leaves.items():
                leaf.grad = row[name].clone()
            found.take(leaves)
            assert all(leaf.grad is None for leaf in leaves.values())
        found.give(leaves)
        return torch.cat([torch.zeros(leaf.numel()) if leaf.grad is None else leaf.grad.flatten() for leaf in leaves.values()])

    flat = [torch.cat([row["a"].flatten(), row["b"]]) for row in drawn]
    expected = sum((row * min(1.0, clip / float(row.norm())) for row in flat[:rows]), torch.zeros(10)) / 4
    torch.testing.assert_close(step(drawn[:rows]), expected, rtol=1e-4, atol=1e-6)
    assert float((step(drawn) - step(drawn[:rows])).norm()) <= clip / 4 * (1 + 1e-4)


def test_noise_is_on_every_leaf_with_the_stated_deviation():
    """z clip / expected, also on leaves without a gradient and in steps without a row; 60 steps of 210 numbers."""
    found, leaves, numbers = gradients(clip=0.5, noise_multiplier=2.0), leaves_of({"a": (10, 20), "b": (10,)}), []
    for _ in range(60):
        found.give(leaves)
        numbers += [leaf.grad.flatten().double() for leaf in leaves.values()]
    assert not torch.equal(numbers[0], numbers[2]), "every step has noise of its own"
    spread = torch.cat(numbers) / (2.0 * 0.5 / 4)
    assert abs(float(spread.var()) - 1) < 5 * (2 / spread.numel()) ** 0.5
    assert abs(float(spread.mean())) < 5 / spread.numel() ** 0.5


def test_leaves_of_one_shape_and_clients_have_noise_of_their_own():
    """Noise that two leaves share would be gone from their difference."""
    seen = []
    for secret in (seeded(0), seeded(1)):
        found, leaves = Gradients(settings=ExamplePrivacy(), noise=secret, expected=4), leaves_of({"a": (3, 4), "b": (3, 4)})
        found.give(leaves)
        seen += [leaf.grad for leaf in leaves.values()]
    assert len({tuple(grad.flatten().tolist()) for grad in seen}) == 4


def test_secret_noise_belongs_to_the_sum_that_it_is_added_to():
    """The same sum has the same noise again; of another one the difference is not the difference of the sums."""
    noise = Noise(b"secret")

    def step(value):
        found, leaves = Gradients(settings=ExamplePrivacy(clip=8.0), noise=noise, expected=4.0), leaves_of({"a": (2, 3)})
        leaves["a"].grad = torch.full((2, 3), value)
        found.take(leaves)
        found.give(leaves)
        return leaves["a"].grad

    assert torch.equal(step(1.0), step(1.0))
    assert float((step(2.0) - step(1.0) - 1.0 / 4).abs().min()) > 1e-3


def test_a_step_begins_without_the_rows_of_the_one_before():
    found, leaves = gradients(clip=None), leaves_of({"a": (2,)})
    leaves["a"].grad = torch.tensor([8.0, 4.0])
    found.take(leaves)
    found.give(leaves)
    assert leaves["a"].grad.tolist() == [2.0, 1.0]
    found.give(leaves)
    assert leaves["a"].grad is None


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_row_whose_gradient_is_not_finite_spoils_the_step_which_ends_the_round(number):
    """To leave it out in silence would be to tell, by what the step lacks, that it was there."""
    found, leaves = gradients(clip=1.0), leaves_of({"a": (2,), "b": (3,)})
    leaves["a"].grad, leaves["b"].grad = torch.tensor([1.0, number]), torch.ones(3)
    found.take(leaves)
    found.give(leaves)
    assert all(leaf.grad.isnan().all() for leaf in leaves.values())


@given(seed=st.integers(0, 2**32), count=st.integers(0, 5))
def test_rows_are_clipped_one_by_one_in_the_training_loop(seed, count):
    """`backward` adds to what is there, as here: each row's gradient is taken before the next one's is made. Brute force."""
    rng = torch.Generator().manual_seed(seed)
    rows, leaves = [torch.randn(5, generator=rng) * 3 for _ in range(count)], leaves_of({"a": (5,)})

    def backward(parts):
        (row,) = parts
        leaves["a"].grad = row if leaves["a"].grad is None else leaves["a"].grad + row
        return float(row[0])

    loss = _of_rows(backward, rows, leaves, gradients(clip=2.0))
    assert loss == pytest.approx(sum(float(row[0]) for row in rows) / max(1, count))
    expected = sum((row * min(1.0, 2.0 / float(row.norm())) for row in rows), torch.zeros(5)) / 4
    found = leaves["a"].grad
    torch.testing.assert_close(torch.zeros(5) if found is None else found, expected, rtol=1e-5, atol=1e-6)


def test_noise_and_rows_of_a_round_are_a_function_of_the_round_and_with_a_secret_of_what_is_there():
    """The seed of a simulation goes by the round alone, so that runs which differ by rounding draw the same rows."""
    client = SimpleNamespace(name="ada", memory=Bundle(), by_rows=None)

    def noise(secret, number=0, leaf=1.0, own=1.0):
        client.memory = Bundle(trees={"personal": {"a": torch.full((2,), own)}})
        package = Bundle(trees={"shared": {"b": torch.full((2,), leaf)}}, facts={"round": number})
        asked = by_rows(ExamplePrivacy(), {"ada": secret}.__getitem__, lambda client, package: Bundle())
        asked(client, package)
        return client.by_rows.noise.secret

    secret = Noise(b"secret")
    for one in (secret, seeded(0)):
        assert noise(one) == noise(one) != noise(one, number=1)
    assert len({noise(secret), noise(secret, leaf=2.0), noise(secret, own=2.0)}) == 3
    assert noise(seeded(0)) == noise(seeded(0), leaf=2.0, own=2.0)


def test_each_row_is_drawn_by_itself_as_often_as_said():
    """3 of 12: each with probability 1/4 in 4,000 steps, two of them together with 1/16; all where as many are expected as there are."""
    rows = Rows(settings=ExamplePrivacy(), noise=seeded(3))
    steps = [rows.chosen(step, 12, 3) for step in range(4000)]
    for row in range(12):
        assert abs(sum(row in step for step in steps) - 1000) < 5 * math.sqrt(4000 * 3 / 16)
    assert abs(sum({2, 7} <= set(step) for step in steps) - 250) < 5 * math.sqrt(4000 * 15 / 256)
    assert rows.chosen(0, 5, 5) == [0, 1, 2, 3, 4]


def train(start, method="fedavg", **options):
    return start(method, federation={"rounds": 1}, **{**(GENERIC if method == "flex" else {}), **options})


def test_without_clip_and_noise_steps_are_those_of_plain_training_on_the_same_rows(start):
    """One row a step has the gradient of a batch of one; training by all rows equals the mean of their losses' gradients.

    A client that draws all its 2 rows in every step, with responses of one length, trains as on batches of both: to rounding.
    """
    options = {"training": {"batch_size": 64, "steps": 1}, "lora": {"dropout": 0.0}, "clients": ("cy",)}
    run = train(start, privacy={"name": "examples", "clip": None, "noise_multiplier": 0}, **options)
    client = run.session.reach.holdings.open("cy")
    alike = [row for row in client.data.train if row.response == client.data.train[0].response][:2]
    client.data = type(client.data)("cy", alike, [], [])
    shared = run.session.server.fresh_shared()
    client.by_rows = Rows(settings=ExamplePrivacy(clip=None, noise_multiplier=0), noise=seeded(0))
    mine = client.fit(shared, round_number=0, lr=1e-2, steps=client.batches(0))
    client.by_rows = None
    client.training = client.training.model_copy(update={"batch_size": 2})
    usual = client.fit(shared, round_number=0, lr=1e-2, steps=client.batches(0))
    assert len(client.batches(0)[0][0].ids) == 2
    assert mine.loss == pytest.approx(usual.loss, rel=1e-6)
    moved = 0.0
    for key, leaf in usual.tree.items():
        torch.testing.assert_close(mine.tree[key], leaf, rtol=0, atol=2e-4)
        moved = max(moved, float((leaf - shared[key]).abs().max()))
    assert moved > 5e-3


@pytest.mark.parametrize(("batch", "expected"), [(2, 2), (64, 5)])
def test_a_client_draws_and_divides_by_its_batch_or_by_all_its_rows_if_these_are_fewer(start, monkeypatch, batch, expected):
    """Of 5 rows; nothing of what was drawn is in the divisor. (The optimiser's own scaling hides a wrong one from whole runs.)"""
    run, drawn, divided = train(start, privacy=NOISED, training={"batch_size": batch}, clients=("cy",)), [], []
    chosen, made = Rows.chosen, Rows.gradients
    monkeypatch.setattr(Rows, "chosen", lambda self, *numbers: drawn.append(numbers) or chosen(self, *numbers))
    monkeypatch.setattr(Rows, "gradients", lambda self, number: divided.append(number) or made(self, number))
    run.go()
    assert drawn == [(0, 5, expected), (1, 5, expected)]
    assert divided == [expected]


@pytest.mark.parametrize("method", ["flex", "scaffold", "local"])
def test_replies_tell_the_number_of_rows_and_no_more_and_personal_leaves_are_noised_too(start, method):
    usual, run = train(start, method).go(), train(start, method, privacy=NOISED).go()
    for question, client, content in run.up:
        if question != "evaluate":
            assert Bundle.decode(content).facts == ({"examples": ROWS[client]} if question == "train" else {})
    for name in ROWS:
        for key, leaf in run.memory(name).tree("personal").items():
            assert not torch.equal(leaf, usual.memory(name).tree("personal")[key])


def test_in_a_cohort_rows_have_the_gradients_that_they_have_alone(start):
    """Clients of 7, 12 and 5 rows draw different numbers of them in a step; to rounding, as AdamW's first step magnifies it."""
    alone, together = (train(start, privacy=NOISED, engine={"cohort": size}).go() for size in (1, 3))
    for key, leaf in alone.state.items():
        torch.testing.assert_close(together.state[key], leaf, rtol=0, atol=2e-5)


def test_the_record_has_the_largest_epsilon_and_each_clients(start):
    """Batches of 2 of 7, 12 and 5 rows, 2 steps in each of 3 rounds; the fewest rows cost most."""
    run = start("fedavg", privacy=NOISED).go()
    record = Record.load(run.session.folder)
    each = {name: epsilon(noise_multiplier=1.0, rate=2 / rows, steps=6, delta=1e-5) for name, rows in ROWS.items()}
    assert record.further["privacy"]["clients"] == each
    assert record.further["privacy"]["epsilon"] == record.rounds[-1]["privacy"]["epsilon"] == max(each.values()) == each["cy"]
    told = dict(run.session.guarantee.lines())["privacy"]
    assert told.startswith(f"epsilon {each['cy']:.3g} at delta 1e-05 for rows, after 6 steps of 3 rounds, in each with probability 0.4")


def test_a_resumed_run_is_the_same_bit_for_bit_with_secrets(place, tmp_path, monkeypatch):
    monkeypatch.setattr("fedgraft.transforms.noise.secrets.token_bytes", lambda count: bytes(range(count)))
    recipe = place.recipe("fedavg", federation={"rounds": 2}, privacy={**NOISED, "secret": True})
    whole = run_recipe(recipe, out=tmp_path / "whole", progress=Quiet())
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, out=tmp_path / "stopped", progress=StopAt("training", 4))
    monkeypatch.undo()
    resume(tmp_path / "stopped", progress=Quiet())
    assert (tmp_path / "stopped" / "digest.txt").read_text() == (whole.folder / "digest.txt").read_text()
    assert len({path.read_text() for path in whole.folder.glob("clients/*/noise.key")}) == 1


@pytest.mark.parametrize("method", plugins.names("method"))
def test_each_method_bears_it_or_is_refused_with_a_reason(method):
    recipe = {"method": {"name": method}, "privacy": {"name": "examples"}, **(GENERIC if method in {"flex", "local_graft"} else {})}
    if method in BEARS:
        load_recipe(recipe)
        return
    with pytest.raises(ValueError, match=f"privacy.name: method '{method}' goes over its rows more than once"):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"method": {"name": "flex"}}, "selection.text to generic"),
        ({"training": {"router_aux": 0.01}}, "training.router_aux"),
        ({"training": {"group_by_length": True}}, "training.group_by_length"),
        ({"privacy": {"name": "examples", "clip": None}}, r"privacy\.clip: noise is measured in units"),
        ({"engine": {"name": "flower"}, "privacy": {"name": "examples", "secret": False}}, r"privacy\.secret"),
    ],
)
def test_what_would_void_the_guarantee_is_refused(sections, reason):
    with pytest.raises(ValueError, match=reason):
        load_recipe({"method": {"name": "fedavg"}, "privacy": {"name": "examples"}, **sections})


def test_lines_of_the_record_stay_json(start):
    run = train(start, privacy={**NOISED, "noise_multiplier": 0}).go()
    line = json.loads((run.session.folder / "rounds.jsonl").read_text())
    assert line["privacy"] == {"of": "rows", "epsilon": None, "delta": 1e-5}
