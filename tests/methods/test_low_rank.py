"""Federated LoRA: exact means of products, ranks that differ, residuals that never touch the base."""

from __future__ import annotations

import itertools

import pytest
import torch

from fedgraft import seeds
from fedgraft.bundle import Bundle
from fedgraft.methods.hetlora import tail
from fedgraft.recipe import load_recipe
from fedgraft.runner import run as run_recipe
from fedgraft.tree import digest, equal
from tests.methods.harness import ROWS
from tests.methods.options import answers, begin, sent_addresses, with_options
from tests.methods.test_identities import LR, train_alone

ALPHA, RANK = 6, 4
BY_RANK = {"ranks": {"ada": 1, "bo": 4, "cy": 2}}
QUIET = {"weights": "examples", "decay": 1.0}


def product(tree, head):
    """(alpha / r) B A, with whatever residual there is."""
    total = torch.zeros(())
    if f"{head}.A" in tree:
        factor_a, factor_b = (tree[f"{head}.{part}"].double() for part in "AB")
        total = total + ALPHA / len(factor_a) * factor_b @ factor_a
    if f"{head}.residual.A" in tree:
        total = total + tree[f"{head}.residual.B"].double() @ tree[f"{head}.residual.A"].double()
    return total + tree.get(f"{head}.residual", torch.zeros(())).double()


def heads(run):
    return [key[:-2] for key in run.session.reach.holdings.model.fresh_adapters(0) if key.endswith(".A")]


def replies(run, round_number=0, clients=3):
    sent = [(name, Bundle.decode(content).tree("shared")) for question, name, content in run.up if question == "train"]
    return dict(sent[round_number * clients : (round_number + 1) * clients])


def mean_product(run, head, round_number=0):
    """The weighted mean of (alpha / r) B A over the replies on the wire."""
    total = sum(ROWS.values())
    return sum(ROWS[name] * product(tree, head) for name, tree in replies(run, round_number).items()) / total


def assert_close(found, expected):
    scale = expected.abs().max()
    assert scale > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=float(1e-6 * scale))


# FedEx-LoRA


def test_fedex_keeps_the_mean_of_products_round_after_round(start):
    """What clients start the next round from is, each time, what they had before plus the mean of what training changed."""
    for rounds in (1, 2):
        run = start("fedex_lora", federation={"rounds": rounds}, training={"lr_min": LR}).go()
        before = start("fedex_lora", federation={"rounds": rounds - 1}, training={"lr_min": LR}).go().state
        for head in heads(run):
            residual = before.get(f"{head}.residual", torch.zeros(())).double()
            assert_close(product(run.state, head), residual + mean_product(run, head, rounds - 1))
            mean_of_factors = product({key: leaf for key, leaf in run.state.items() if "residual" not in key}, head)
            assert (mean_of_factors + residual - product(run.state, head)).abs().max() > 1e-9  # the mean of A and B is not enough


def test_fedex_of_one_client_is_plain_training_and_has_no_residual(start, monkeypatch):
    run = start("fedex_lora", clients=("ada",)).go()
    assert equal(run.state, train_alone(run, "ada", run.session.reach.holdings.model.fresh_adapters(0), [], monkeypatch))


@pytest.mark.parametrize("name", ["fedex_lora", "flora"])
def test_residuals_are_used_and_travel_down_alone_and_the_base_stays(start, name):
    run = start(name)
    before = run.session.reach.holdings.model.frozen_digest()
    run.go()
    assert run.session.reach.holdings.model.frozen_digest() == before
    down = {key for _, _, content in run.down for key in Bundle.decode(content).tree("shared")}
    up = {key for _, _, content in run.up for key in Bundle.decode(content).tree("shared")}
    assert any(".residual" in key for key in down)
    assert {key.rpartition(".")[2] for key in up} == {"A", "B"}
    assert not any(".residual" in key for key in up)
    whole = answers(run, "ada")["personal"].tree
    with run.session.reach.holdings.model.using(whole, []):
        used = run.session.reach.holdings.model.base.model(torch.arange(12)[None]).logits
    with run.session.reach.holdings.model.using({key: leaf for key, leaf in whole.items() if ".residual" not in key}, []):
        assert not torch.equal(run.session.reach.holdings.model.base.model(torch.arange(12)[None]).logits, used)


# FLoRA


@pytest.mark.parametrize("options", [{}, BY_RANK])
def test_flora_adds_up_the_means_of_products(place, tmp_path, options):
    run = begin(place, tmp_path, "flora", options, training={"lr_min": LR}).go()
    for head in heads(run):
        assert_close(product(run.state, head), sum(mean_product(run, head, number) for number in range(3)))
    ranks = options.get("ranks", dict.fromkeys(ROWS, RANK))
    assert {name: {len(leaf) for key, leaf in tree.items() if key.endswith(".A")} for name, tree in replies(run).items()} == {
        name: {rank} for name, rank in ranks.items()
    }


def test_floras_residual_is_a_stack_until_a_matrix_is_smaller(place, tmp_path):
    """q is 32 x 32, k and v 16 x 32. Ranks 1 + 4 + 2 a round: 7 (32 + 32) < 1024 in the first two, 7 (16 + 32) < 512 in the first alone."""
    for rounds, dense in ((1, set()), (2, set("kv")), (3, set("qkv"))):
        run = begin(place, tmp_path / str(rounds), "flora", BY_RANK, federation={"rounds": rounds}).go()
        assert {key.split(".")[3] for key in run.state if key.endswith(".residual")} == dense
        assert {key.split(".")[3] for key in run.state if key.endswith(".residual.A")} == set("qkv") - dense


def test_flora_of_one_client_and_round_is_plain_training_of_a_new_pair(start, monkeypatch):
    run = start("flora", clients=("ada",), federation={"rounds": 1}, training={"lr_min": LR}).go()
    sent = replies(run, clients=1)["ada"]
    drawn = run.session.reach.holdings.model.fresh_adapters(seeds.derive(0, "pair", 0, "ada"))
    assert equal(sent, train_alone(run, "ada", drawn, [], monkeypatch, rounds=[0], of=2))
    assert equal(
        {key.replace(".residual", ""): leaf for key, leaf in run.state.items() if key.endswith("A")},
        {key: leaf for key, leaf in sent.items() if key.endswith("A")},
    )


# FlexLoRA


@pytest.mark.parametrize(("rank", "ranks"), [(7, [1, 4, 2]), (32, [32, 20, 31])])
def test_flexlora_is_the_mean_of_products_at_enough_rank(place, tmp_path, rank, ranks):
    """At the sum of the ranks, or at the width of the layers; to the next client it is cut to its rank, the best one there is."""
    run = begin(place, tmp_path, "flexlora", {"ranks": ranks}, lora={"rank": rank}, federation={"rounds": 1}).go()
    client_rank = ranks[0]
    received = run.session.method.pack(run.session.method, run.session.server, "ada").tree("shared")
    for head in heads(run):
        expected = mean_product(run, head)
        assert len(run.state[f"{head}.A"]) == rank
        assert_close(product(run.state, head), expected)
        left, sizes, right = torch.linalg.svd(expected, full_matrices=False)
        best = left[:, :client_rank] * sizes[:client_rank] @ right[:client_rank]
        assert len(received[f"{head}.A"]) == client_rank
        torch.testing.assert_close(product(received, head), best, rtol=0, atol=float(1e-5 * sizes[0]))


def test_flexlora_of_one_client_keeps_its_product(start, monkeypatch):
    run = start("flexlora", clients=("ada",), federation={"rounds": 1}, training={"lr_min": LR}).go()
    trained = train_alone(run, "ada", run.session.reach.holdings.model.fresh_adapters(0), [], monkeypatch, rounds=[0], of=2)
    for head in heads(run):
        assert_close(product(run.state, head), product(trained, head))


# HetLoRA


def test_hetlora_of_equal_ranks_without_weighting_and_pruning_is_fedavg(start, place, tmp_path):
    found, plain = begin(place, tmp_path, "hetlora", QUIET).go(), start("fedavg").go()
    for key, leaf in found.state.items():
        torch.testing.assert_close(leaf, plain.state[key], rtol=0, atol=1e-6)


def test_hetlora_pads_and_weights_by_the_norm_of_the_product(place, tmp_path):
    """By hand from the replies: ranks 1, 4, 2, padded to 4 with the same (alpha / r) B A."""
    run = begin(place, tmp_path, "hetlora", {**BY_RANK, "decay": 1.0}, federation={"rounds": 1}).go()
    sent = replies(run)
    assert {name: len(tree[f"{heads(run)[0]}.A"]) for name, tree in sent.items()} == BY_RANK["ranks"]
    norms = {name: sum(product(tree, head).square().sum() for head in heads(run)).sqrt() for name, tree in sent.items()}
    for head in heads(run):
        factor_a, factor_b = torch.zeros(RANK, 32, dtype=torch.float64), torch.zeros(len(run.state[f"{head}.B"]), RANK, dtype=torch.float64)
        for name, tree in sent.items():
            rank, share = len(tree[f"{head}.A"]), norms[name] / sum(norms.values())
            factor_a[:rank] += share * tree[f"{head}.A"].double()
            factor_b[:, :rank] += share * tree[f"{head}.B"].double() * RANK / rank
        torch.testing.assert_close(run.state[f"{head}.A"].double(), factor_a, rtol=0, atol=1e-7)
        torch.testing.assert_close(run.state[f"{head}.B"].double(), factor_b, rtol=0, atol=1e-7)


def test_hetlora_truncates_to_the_part_of_the_product(place, tmp_path):
    run = begin(place, tmp_path, "hetlora", {**BY_RANK, **QUIET}, federation={"rounds": 1}).go()
    received = run.session.method.pack(run.session.method, run.session.server, "cy").tree("shared")
    for head in heads(run):
        part = ALPHA / RANK * run.state[f"{head}.B"][:, :2].double() @ run.state[f"{head}.A"][:2].double()
        torch.testing.assert_close(product(received, head), part, rtol=0, atol=1e-8)


def test_hetlora_prunes_what_has_become_smaller_for_good(place, tmp_path):
    """A strong penalty drives B's last columns to 0, at a rate at which nothing else can grow them; the rank falls and stays."""
    options = {"decay": 0.75, "strength": 1e3}
    run = begin(place, tmp_path, "hetlora", options, training={"optimizer_state": "kept"}, federation={"rounds": 4}).go()
    ranks = run.session.server.state.facts["ranks"]
    assert all(rank < RANK for rank in ranks.values())
    for name, tree in replies(run, 3).items():
        assert {len(leaf) for key, leaf in tree.items() if key.endswith(".A")} == {ranks[name]}
        assert {leaf.shape[1] for key, leaf in tree.items() if key.endswith(".B")} == {ranks[name]}
    history = [{name: len(tree[f"{heads(run)[0]}.A"]) for name, tree in replies(run, number).items()} for number in range(4)]
    assert all(before[name] >= after[name] for before, after in itertools.pairwise(history) for name in ROWS)


def test_the_tail_by_hand():
    """Two ranks of three left: ||B[:, 2]|| ||A[2]|| = 5 * 13."""
    tree = {"h.A": torch.tensor([[1.0, 1], [2, 2], [5, 12]]), "h.B": torch.tensor([[9.0, 9, 3], [9, 9, 4]])}
    assert tail(tree, 2).item() == 65.0


# What they cannot do


@pytest.mark.parametrize("name", ["flexlora", "hetlora", "flora"])
@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([5], r"rank 5 of client 'ada'; choose 1 to lora.rank, which is 4"),
        ([4, 0], r"rank 0 of client 'bo'; choose 1 to lora.rank"),
        ([], r"an empty list; leave it out"),
        ({"ada": 1, "bo": 1, "dee": 1}, r"no rank for cy, a rank for dee that is no client; the clients are ada, bo, cy"),
    ],
)
def test_ranks_that_cannot_be_are_refused_before_training(place, tmp_path, name, ranks, message):
    with pytest.raises(ValueError, match=f"method.ranks: {message}"):
        run_recipe(with_options(place, name, {"ranks": ranks}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["fedavg", "fedex_lora"])
def test_ranks_are_an_option_of_few(place, name):
    with pytest.raises(ValueError, match=rf"method.ranks: '{name}' has no such option; its options: none"):
        load_recipe(with_options(place, name, {"ranks": [1, 2, 3]}))


@pytest.mark.parametrize(("targets", "named"), [(["q", "experts"], "'experts'"), (["q", "router"], "'router'")])
@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_residuals_elsewhere_are_refused_before_training(place, tmp_path, name, targets, named):
    with pytest.raises(ValueError, match=rf"lora.targets: this method adds .* at {named}; .* q, k, v, o"):
        run_recipe(place.recipe(name, lora={"targets": targets}), out=tmp_path / "run")


@pytest.mark.parametrize("options", [{"decay": 0.0}, {"decay": 1.5}, {"strength": -1.0}])
def test_hetloras_options_are_checked(place, options):
    with pytest.raises(ValueError, match=r"method.weights, method.decay, method.strength: .*; choose norm or examples, above 0 to 1"):
        load_recipe(with_options(place, "hetlora", options))


@pytest.mark.parametrize("name", ["flexlora", "hetlora"])
def test_experts_and_router_are_merged_too(start, name):
    """Pairs on experts as any other; router rows, which are no pair, are averaged by examples."""
    run = start(name, lora={"targets": ["q", "experts", "router"]}, federation={"rounds": 1}).go()
    assert {key.split(".")[2] for key in run.state} == {"attention", "expert", "router"}
    if name == "flexlora":
        key = "layers.0.router.weight"
        expected = sum(ROWS[client] * tree[key].double() for client, tree in replies(run).items()) / sum(ROWS.values())
        torch.testing.assert_close(run.state[key].double(), expected, rtol=0, atol=1e-7)


def test_runs_do_not_depend_on_anything_but_the_seed(start):
    for name in ("flexlora", "flora"):
        assert digest(start(name).go().state) == digest(start(name).go().state)
        assert not any(".own." in key for key in sent_addresses(start(name).go()))


@pytest.mark.parametrize("name", ["flora", "flexlora", "hetlora", "fedex_lora"])
def test_another_merge_in_the_place_of_the_methods_own_is_refused(place, name):
    with pytest.raises(ValueError, match=rf"federation.merge: 'median' can't be used, since method '{name}' needs its own"):
        load_recipe(place.recipe(name, federation={"merge": {"rule": "median"}}))
