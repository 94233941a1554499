"""The methods that differ from FedAvg in how clients train or in the server's step."""

from __future__ import annotations

import json

import pytest
import torch

from fedgraft.bundle import Bundle
from fedgraft.recipe import load_recipe
from fedgraft.tree import equal, subtract
from tests.methods.harness import ROWS
from tests.methods.test_identities import LR, train_alone
from tests.training import plain


def close(left, right, tolerance):
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key].double(), right[key].double(), rtol=0, atol=tolerance)


def trained(run, round_number, of=3):
    """{client: (leaves, examples)} of a round, from the wire."""
    sent = [(name, Bundle.decode(content)) for question, name, content in run.up if question == "train"]
    return {name: (reply.tree("shared"), reply.facts["examples"]) for name, reply in sent[round_number * of : (round_number + 1) * of]}


def mean(replies, weighted=True):
    total = sum(examples if weighted else 1 for _, examples in replies.values())
    keys = next(iter(replies.values()))[0].keys()
    return {key: sum(leaves[key].double() * (examples if weighted else 1) for leaves, examples in replies.values()) / total for key in keys}


def test_fedprox_without_its_term_is_fedavg_bit_for_bit(start):
    kept = {"optimizer_state": "kept"}
    fedavg, fedprox = (
        start("fedavg", training=kept).go(),
        start("fedprox", training=kept, options={"mu": 0}).go(),
    )
    assert equal(fedavg.state, fedprox.state)
    assert fedavg.digest == fedprox.digest


def test_fedprox_is_the_plain_loop_with_mu_half_of_the_squared_distance(start, monkeypatch):
    """One round of one client of two steps; the reference adds the term to its loss."""
    mu = 50.0
    run = start("fedprox", clients=("ada",), federation={"rounds": 1}, training={"lr_min": LR}, options={"mu": mu}).go()
    first = run.session.reach.holdings.model.fresh_adapters(0)
    loop = plain.train

    def with_term(model, tree, steps, settings, **options):
        return loop(
            model, tree, steps, settings, extra=lambda now, batch: mu / 2 * sum((now[k] - first[k]).square().sum() for k in now), **options
        )

    monkeypatch.setattr(plain, "train", with_term)
    close(run.state, train_alone(run, "ada", first, [], monkeypatch, rounds=[0], of=2), 1e-6)
    monkeypatch.setattr(plain, "train", loop)
    free = train_alone(run, "ada", first, [], monkeypatch, rounds=[0], of=2)
    assert max((run.state[key] - free[key]).abs().max().item() for key in free) > 1e-4


def test_fedavgm_moves_on_in_the_direction_of_before(start):
    """Two rounds from the wire: w1 = mean of the replies, w2 = w1 + 0.5 (w1 - w0) + (mean of the replies - w1)."""
    run = start("fedavgm", federation={"rounds": 2}, options={"beta": 0.5}).go()
    first = run.session.reach.holdings.model.fresh_adapters(0)
    once = mean(trained(run, 0))
    expected = {key: 0.5 * (leaf - first[key].double()) + mean(trained(run, 1))[key] for key, leaf in once.items()}
    close(run.state, expected, 1e-6)
    assert equal(start("fedavgm", options={"beta": 0}).go().state, start("fedavg").go().state)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
@pytest.mark.parametrize("released", [False, True])
def test_first_adaptive_step_is_the_formula(start, name, released):
    """m = (1 - beta) delta, v from tau^2, w = w0 + 1e-3 m / (sqrt(v) + 1e-3); as released: unweighted, m = delta."""
    run = start(name, federation={"rounds": 1}, options={"released": released}).go()
    first = run.session.reach.holdings.model.fresh_adapters(0)
    second = {"fedadam": lambda v, s: 0.99 * v + 0.01 * s, "fedyogi": lambda v, s: v - 0.01 * s * (v - s).sign(), "fedadagrad": torch.add}[
        name
    ]
    beta = 0.0 if released or name == "fedadagrad" else 0.9
    delta = subtract(mean(trained(run, 0), weighted=not released), first)
    moved = {key: 1e-3 * (1 - beta) * d / (second(torch.tensor(1e-6).double(), d.square()).sqrt() + 1e-3) for key, d in delta.items()}
    close(run.state, {key: first[key].double() + moved[key] for key in moved}, 1e-7)
    assert run.session.server.state.tree("second_moment").keys() == run.state.keys()


def test_moments_stay_on_the_server(start):
    run = start("fedadam").go()
    assert {name for _, _, content in run.down + run.up for name in Bundle.decode(content).trees} == {"shared"}
    assert set(run.session.server.state.trees) == {"shared", "momentum", "second_moment"}


@pytest.fixture
def alike(place, tmp_path_factory):
    """Two clients with the same rows, each as one batch, so that every order of them is the same."""
    folder = tmp_path_factory.mktemp("alike")
    rows = [
        {"instruction": f"blue {n}", "output": "tac eulb", "split": split} for n, split in enumerate(["validation", "test", *["train"] * 2])
    ]
    for name in ("ada", "bo"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"data": {"path": str(folder)}, "lora": {"dropout": 0.0}, "training": {"batch_size": 2, "steps": 3}}


def test_scaffold_of_equal_clients_is_fedavg(start, alike):
    """Every c_i equals c, so nothing is corrected."""
    fedavg, scaffold = start("fedavg", **alike).go(), start("scaffold", **alike).go()
    close(scaffold.state, fedavg.state, 1e-6)
    assert all(leaf.any() for leaf in scaffold.session.server.state.tree("control").values())


def scaffold_alone(run, client, tree, control, own, monkeypatch, round_number, of):
    """(leaves, raw gradients of every step) of a plain loop with the loss <c - c_i, w> added, whose gradient is the correction."""
    loop, gradients = plain.train, {key: [] for key in tree}
    correction = {key: (control[key] - own[key]).float() if own else torch.zeros_like(leaf) for key, leaf in tree.items()}

    def term(now, batch):
        for key, leaf in now.items():
            if not leaf._backward_hooks:  # in the first step
                leaf.register_hook(lambda grad, key=key: gradients[key].append(grad.double() - correction[key]))
        return sum((correction[key] * leaf).sum() for key, leaf in now.items())

    monkeypatch.setattr(plain, "train", lambda *arguments, **options: loop(*arguments, extra=term, **options))
    found = train_alone(run, client, tree, [], monkeypatch, rounds=[round_number], of=of)
    monkeypatch.setattr(plain, "train", loop)
    return found, gradients


def test_scaffold_is_the_papers_algorithm_with_raw_gradients(start, monkeypatch):
    """Two rounds of two clients by hand: c_i+ = mean raw gradient of the two steps, c = mean of the c_i, leaves averaged unweighted."""
    run = start("scaffold", clients=("ada", "bo"), federation={"rounds": 2}, lora={"dropout": 0.0}).go()
    leaves, control, own = run.session.reach.holdings.model.fresh_adapters(0), {}, {"ada": {}, "bo": {}}
    for number in (0, 1):
        ends, after = {}, {}
        for name, mine in own.items():
            ends[name], seen = scaffold_alone(run, name, leaves, control, mine, monkeypatch, number, 2)
            after[name] = {key: sum(seen[key]) / 2 for key in leaves}
        leaves = {key: ((ends["ada"][key].double() + ends["bo"][key].double()) / 2).float() for key in leaves}
        control = {key: control.get(key, 0) + sum(after[name][key] - own[name].get(key, 0) for name in own) / 2 for key in leaves}
        own = after
    close(run.state, leaves, 2e-6)
    close(run.session.server.state.tree("control"), control, 1e-6)
    for name in own:
        close(run.memory(name).tree("control"), own[name], 1e-6)


def test_scaffolds_control_stays_the_mean_of_the_clients_whatever_is_lost(start):
    """Replies lost in rounds 1 and 2 are made up for in the client's next one."""
    lost = {("train", 1, "ada"), ("train", 2, "ada"), ("train", 1, "cy")}
    run = start("scaffold", federation={"rounds": 4}, lost=lambda *what: what in lost).go()
    own = [run.memory(name).tree("control") for name in ROWS]
    for key, leaf in run.session.server.state.tree("control").items():
        torch.testing.assert_close(leaf, sum(tree[key] for tree in own) / 3, rtol=0, atol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_scaffolds_leaves_are_averaged_as_in_the_paper_or_as_released(start, weighted):
    """Rows 7, 12 and 5: unweighted, or by examples; from the replies on the wire."""
    run = start("scaffold", federation={"rounds": 1}, options={"weighted": weighted}).go()
    close(run.state, mean(trained(run, 0), weighted), 1e-7)
    other = mean(trained(run, 0), not weighted)
    assert max((run.state[key] - other[key]).abs().max().item() for key in other) > 1e-5


def test_scaffold_with_one_client_is_plain_training(start):
    """c = c_i always."""
    one = {"clients": ("ada",), "lora": {"dropout": 0.0}}
    close(start("scaffold", **one).go().state, start("fedavg", **one).go().state, 1e-6)


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        ({"name": "fedprox", "mu": -1}, r"method\.mu: Input should be greater than or equal to 0 \(got -1\)"),
        ({"name": "fedprox", "mu": "much"}, r"method\.mu: Input should be a valid number"),
        ({"name": "fedavgm", "beta": 1}, r"method\.beta: Input should be less than 1"),
        ({"name": "fedadam", "tau": 0}, r"method\.tau: Input should be greater than 0"),
        ({"name": "fedadam", "mu": 0.1}, r"method\.mu: 'fedadam' has no such option.*its options: server_lr, beta1, beta2, tau, released"),
    ],
)
def test_bad_options_are_refused(method, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_recipe({"method": method})
