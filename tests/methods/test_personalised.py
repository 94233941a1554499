"""Personalised methods: what each must equal, what it shares and what it keeps."""

from __future__ import annotations

import pytest
import torch

from fedgraft.address import MIX, as_first, as_own, layer_of, own
from fedgraft.bundle import Bundle
from fedgraft.recipe import load_recipe
from fedgraft.report.progress import Quiet
from fedgraft.runner import resume
from fedgraft.runner import run as run_recipe
from fedgraft.session import Session
from fedgraft.training.personal_rules import distance
from fedgraft.tree import combine, equal, partition
from tests.methods.harness import ROWS
from tests.methods.options import answers, begin, sent_addresses, with_options
from tests.methods.test_identities import LR, train_alone


def mean(run, trees, key):
    """Weighted by 7, 12, 5 rows."""
    total = sum(ROWS.values())
    return sum(ROWS[name] * trees[name][key].double() for name in ROWS) / total


# Ditto


def test_dittos_shared_path_is_fedavg_and_without_pull_its_personal_one_is_local(start, place, tmp_path):
    """Bit for bit; 2 of 3 clients a round, kept moments."""
    options = {"federation": {"clients_per_round": 2}, "training": {"optimizer_state": "kept"}}
    plain, alone = start("fedavg", **options).go(), start("local", **options).go()
    ditto = begin(place, tmp_path / "0", "ditto", {"pull": 0}, **options).go()
    assert equal(ditto.state, plain.state)
    assert sent_addresses(ditto) == sent_addresses(plain)
    for name in ROWS:
        if "personal" in alone.memory(name).trees:
            assert equal(answers(ditto, name)["personal"].tree, alone.memory(name).tree("personal"))
    pulled = begin(place, tmp_path / "5", "ditto", {"pull": 5.0}, **options).go()
    assert equal(pulled.state, plain.state)
    assert any(not equal(answers(pulled, name)["personal"].tree, answers(ditto, name)["personal"].tree) for name in ROWS)


def test_dittos_pull_is_towards_the_received_leaves(place, tmp_path):
    """One client, two rounds: v of round 1 starts from v of round 0 and is pulled to what round 0 left on the server."""
    run = begin(place, tmp_path, "ditto", {"pull": 3.0}, clients=("ada",), federation={"rounds": 2}, training={"lr_min": LR}).go()
    client = run.session.reach.holdings.open("ada")
    shared = second = run.session.reach.holdings.model.fresh_adapters(0)
    for number in (0, 1):
        second = client.fit(second, round_number=number, lr=LR, penalty=distance(shared, 3.0)).tree
        shared = client.fit(shared, round_number=number, lr=LR).tree
    assert equal(run.memory("ada").tree("personal"), as_own(second))
    assert equal(run.state, shared)


def test_the_penalty_and_its_gradient_by_hand():
    """3/2 ((2 - 1)^2 + (1 - 3)^2) = 7.5; gradients 3 (v - w)."""
    leaves = {"a": torch.tensor([2.0, 1.0], requires_grad=True)}
    loss = distance({"a": torch.tensor([1.0, 3.0]), "not trained": torch.ones(1)}, 3.0)(leaves)
    loss.backward()
    assert loss.item() == 7.5
    assert leaves["a"].grad.tolist() == [3.0, -6.0]


def test_a_pull_away_is_refused(place):
    with pytest.raises(ValueError, match=r"method.pull: -1.0 pushes .* choose 0 or more"):
        load_recipe(with_options(place, "ditto", {"pull": -1}))


# FedPer and FedRep


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_the_last_layers_stay(start, name):
    run = start(name).go()
    assert {layer_of(key) for key in run.state} == {0}
    assert {layer_of(key) for key in sent_addresses(run)} == {0}
    for client in ROWS:
        assert {layer_of(key) for key in run.memory(client).tree("personal")} == {1}


def test_fedper_of_one_client_is_plain_training(start, monkeypatch):
    run = start("fedper", clients=("ada",)).go()
    expected = train_alone(run, "ada", run.session.reach.holdings.model.fresh_adapters(0), [], monkeypatch)
    assert equal(combine(run.state, run.memory("ada").tree("personal")), expected)


def test_fedper_averages_below_and_keeps_above(start, monkeypatch):
    run = start("fedper", federation={"rounds": 1}, training={"lr_min": LR}).go()
    first = run.session.reach.holdings.model.fresh_adapters(0)
    trained = {name: train_alone(run, name, first, [], monkeypatch, rounds=[0], of=2) for name in ROWS}
    for key, leaf in run.state.items():
        torch.testing.assert_close(leaf.double(), mean(run, trained, key), rtol=0, atol=1e-7)
    for name in ROWS:
        own = partition(trained[name], lambda key: layer_of(key) == 1)[0]
        assert equal(run.memory(name).tree("personal"), own)
        assert equal(answers(run, name)["personal"].tree, combine(run.state, own))
        assert equal(answers(run, name)["trained"].tree, trained[name])


def test_fedrep_trains_the_head_on_the_received_layers_then_those_below_it(start):
    """One client, by hand, with the moments it keeps."""
    run = start("fedrep", clients=("ada",), training={"optimizer_state": "kept", "lr_min": LR}, federation={"rounds": 2}).go()
    client = run.session.reach.holdings.open("ada")
    head, body = partition(run.session.reach.holdings.model.fresh_adapters(0), lambda key: layer_of(key) == 1)
    moments = [None, None]
    for number in (0, 1):
        above = client.fit(head, round_number=number, lr=LR, fixed=body, moments=moments[0])
        below = client.fit(body, round_number=number, lr=LR, fixed=above.tree, moments=moments[1])
        head, body, moments = above.tree, below.tree, [above.moments, below.moments]
    assert equal(run.memory("ada").tree("personal"), head)
    assert equal(run.state, body)


@pytest.mark.parametrize("layers", [0, 2])
def test_layers_that_leave_nothing_shared_or_nothing_personal_are_refused_before_training(place, tmp_path, layers):
    recipe = with_options(place, "fedper", {"layers": layers})
    with pytest.raises(ValueError, match=rf"method.layers: {layers} of 2 adapted layers can't be personal; choose 1 to 1"):
        run_recipe(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# FedSA-LoRA and FFA-LoRA


def test_fedsa_of_one_client_is_plain_training_and_a_alone_is_sent(start, monkeypatch):
    run = start("fedsa_lora", clients=("ada",)).go()
    expected = train_alone(run, "ada", run.session.reach.holdings.model.fresh_adapters(0), [], monkeypatch)
    assert equal(combine(run.state, run.memory("ada").tree("personal")), expected)
    assert {key[-1] for key in sent_addresses(run)} == {"A"}
    assert list(answers(run, "ada")) == ["base", "trained", "personal"]  # A alone is no model


def test_fedsa_averages_a_and_keeps_b(start, monkeypatch):
    run = start("fedsa_lora", federation={"rounds": 1}, training={"lr_min": LR}).go()
    first = run.session.reach.holdings.model.fresh_adapters(0)
    trained = {name: train_alone(run, name, first, [], monkeypatch, rounds=[0], of=2) for name in ROWS}
    for key, leaf in run.state.items():
        torch.testing.assert_close(leaf.double(), mean(run, trained, key), rtol=0, atol=1e-7)
    for name in ROWS:
        assert equal(run.memory(name).tree("personal"), {key: leaf for key, leaf in trained[name].items() if key.endswith("B")})


def test_ffa_never_moves_a_and_shares_b(start):
    run = start("ffa_lora").go()
    drawn = {key: leaf for key, leaf in run.session.reach.holdings.model.fresh_adapters(0).items() if key.endswith("A")}
    assert {key[-1] for key in sent_addresses(run)} == {"B"}
    for name in ROWS:
        assert equal(run.memory(name).tree("personal"), drawn)
        assert equal(answers(run, name)["personal"].tree, combine(drawn, run.state))


def test_ffa_averages_the_products_exactly(start):
    """sum_c n_c/n B_c A = (sum_c n_c/n B_c) A, from the replies on the wire."""
    run = start("ffa_lora", federation={"rounds": 1}).go()
    drawn = run.session.reach.holdings.model.fresh_adapters(0)
    replies = {name: Bundle.decode(content).tree("shared") for question, name, content in run.up if question == "train"}
    for key, leaf in run.state.items():
        factor = drawn[key[:-1] + "A"].double()
        products = {name: {key: tree[key].double() @ factor} for name, tree in replies.items()}
        torch.testing.assert_close(leaf.double() @ factor, mean(run, products, key), rtol=0, atol=1e-7)


# FedAvg with fine-tuning


def test_fine_tuning_starts_from_fedavg_and_is_plain_training_on_the_next_batches(start, place, tmp_path):
    run = begin(place, tmp_path, "fedavg_ft", {"rounds": 2, "lr": 5e-4}).go()
    plain = start("fedavg").go()
    assert equal(run.state, plain.state)
    for name in ROWS:
        client, tree = run.session.reach.holdings.open(name), plain.state
        for number in (3, 4):
            tree = client.fit(tree, round_number=number, lr=5e-4).tree
        assert equal(run.memory(name).tree("personal"), as_own(tree))
        assert equal(answers(run, name)["personal"].tree, tree)
        assert equal(answers(run, name)["shared"].tree, plain.state)
    assert not any(".own." in key for key in sent_addresses(run))


def test_a_client_whose_fine_tuning_is_lost_predicts_with_the_shared_leaves(start):
    run = start("fedavg_ft")
    ask = run.session.engine.site.questions["finish"]

    def fails(client, package):
        reply = ask(client, package)
        if client.name == "bo":
            client.memory = run.memory("bo")
        return reply

    run.session.engine.site.questions = {**run.session.engine.site.questions, "finish": fails}
    run.go()
    assert equal(answers(run, "bo")["personal"].tree, run.state)
    assert not equal(answers(run, "ada")["personal"].tree, run.state)


class StopInFinish(Quiet):
    """Ctrl-C after so many clients have been fine-tuned."""

    def __init__(self, clients):
        self.phase, self.left = "", clients

    def begin(self, phase, total):
        self.phase = phase

    def step(self, note=""):
        self.left -= self.phase == "finishing"
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("clients", [1, 3])
def test_interrupted_fine_tuning_resumes_and_an_extended_run_tunes_anew(place, tmp_path, clients):
    recipe = place.recipe("fedavg_ft", federation={"rounds": 1})
    whole = run_recipe(recipe, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, out=tmp_path / "cut", progress=StopInFinish(clients))
    assert resume(tmp_path / "cut").digest == whole.digest
    longer, again = (resume(tmp_path / name, rounds=2) for name in ("cut", "whole"))
    assert longer.digest == again.digest != whole.digest
    session = Session(load_recipe(tmp_path / "whole" / "recipe.yaml"), tmp_path / "whole", Quiet())
    session.restore()
    memory = session.engine.store.load("cy", session.engine.asked)
    run_recipe(place.recipe("fedavg", federation={"rounds": 1}), out=tmp_path / "plain")
    resume(tmp_path / "plain", rounds=2)
    assert Bundle.load(tmp_path / "plain" / "state" / "state.safetensors").digest() == session.server.state.digest()
    expected = session.reach.holdings.open("cy").fit(session.server.state.tree("shared"), round_number=2, lr=LR).tree
    assert equal(as_first(memory.tree("personal")), expected)


@pytest.mark.parametrize("options", [{"rounds": 0}, {"lr": 0.0}])
def test_fine_tuning_that_trains_nothing_is_refused(place, options):
    with pytest.raises(ValueError, match=r"method.rounds, method.lr: .* train nothing; choose"):
        load_recipe(with_options(place, "fedavg_ft", options))


# APFL


def test_apfls_ends_are_fedavg_and_local_and_its_shared_path_is_fedavg(start, place, tmp_path):
    """Bit for bit, with dropout and kept moments."""
    options = {"training": {"optimizer_state": "kept"}}
    plain, alone = start("fedavg", **options).go(), start("local", **options).go()
    shared, own = (begin(place, tmp_path / str(mix), "apfl", {"mix": mix}, **options).go() for mix in (0, 1))
    assert equal(shared.state, plain.state)
    assert equal(own.state, plain.state)
    ids = torch.arange(24).reshape(2, 12)
    for name in ROWS:
        second = partition(own.memory(name).tree("personal"), lambda key: key != MIX)[0]
        assert equal(as_first(second), alone.memory(name).tree("personal"))
        first = partition(shared.memory(name).tree("personal"), lambda key: key != MIX)[0]
        assert equal(as_first(first), shared.session.reach.holdings.model.fresh_adapters(0))  # a share of 0 has no gradient
        for run, expected in ((shared, plain.state), (own, alone.memory(name).tree("personal"))):
            model = run.session.reach.holdings.model
            with model.using(answers(run, name)["personal"].tree, []), torch.no_grad():
                found = model.base.model(ids).logits
            with model.using(expected, []), torch.no_grad():
                assert torch.equal(found, model.base.model(ids).logits)


def test_apfl_predicts_with_the_blend_of_the_changes(place, tmp_path):
    """W + 0.3 s B_v A_v + 0.7 s B_w A_w, against a single pair of twice the rank that holds both."""
    run = begin(place, tmp_path, "apfl", {"mix": 0.3}, federation={"rounds": 1}).go()
    tree, model = answers(run, "bo")["personal"].tree, run.session.reach.holdings.model
    joint = {}
    for key in run.state:
        if key.endswith(".A"):
            other = key[:-1] + "B"
            joint[key] = torch.cat([tree[key], tree[own(key)]])
            joint[other] = 2 * torch.cat([0.7 * tree[other], 0.3 * tree[own(other)]], dim=1)  # alpha / 2r
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        with model.using(tree, []):
            found = model.base.model(ids).logits
        with model.using(joint, []):
            torch.testing.assert_close(found, model.base.model(ids).logits, rtol=1e-5, atol=1e-5)
        with model.using(run.state, []):
            assert (found - model.base.model(ids).logits).abs().max() > 1e-4


def test_apfls_share_adapts_by_its_own_rate_and_stays_in_bounds(place, tmp_path):
    """One client and two rounds by hand: w, then v in the blend with the new w, then the share."""
    run = begin(place, tmp_path, "apfl", {"mix_lr": 0.01}, clients=("ada",), federation={"rounds": 2}, training={"lr_min": LR}).go()
    client = run.session.reach.holdings.open("ada")
    first, mix = run.session.reach.holdings.model.fresh_adapters(0), {MIX: torch.tensor(0.5)}
    second = as_own(first)
    for number in (0, 1):
        first = client.fit(first, round_number=number, lr=LR).tree
        second = client.fit(second, round_number=number, lr=LR, fixed=first | mix).tree
        mix = client.fit(mix, round_number=number, lr=0.01, fixed=first | second).tree
    assert equal(run.memory("ada").tree("personal"), second | mix)
    assert abs(mix[MIX].item() - 0.5) > 0.001
    assert not any("mix" in key for key in sent_addresses(run))
    far = begin(place, tmp_path / "far", "apfl", {"mix_lr": 1e3}, clients=("ada",), federation={"rounds": 2}).go()
    assert far.memory("ada").tree("personal")[MIX].item() in {0.0, 1.0}


@pytest.mark.parametrize("options", [{"mix": 1.1}, {"mix": -0.1}, {"mix_lr": -1.0}])
def test_shares_that_are_none_are_refused(place, options):
    with pytest.raises(ValueError, match=r"method.mix, method.mix_lr: .* choose a share from 0 to 1"):
        load_recipe(with_options(place, "apfl", options))


def test_second_pairs_on_experts_are_refused_before_training(place, tmp_path):
    with pytest.raises(ValueError, match=r"lora.targets: this method adds .* at 'experts'"):
        run_recipe(place.recipe("apfl", lora={"targets": ["q", "experts"]}), out=tmp_path / "run")


# pFedMe


def test_pfedme_by_hand(place, tmp_path):
    """Two clients, one round of two steps of three inner ones; the server's mean is not weighted."""
    options = {"pull": 2.0, "rate": 0.2, "inner": 3}
    run = begin(place, tmp_path, "pfedme", options, clients=("ada", "bo"), federation={"rounds": 1}, training={"lr_min": LR}).go()
    anchors = {}
    for name in ("ada", "bo"):
        client = run.session.reach.holdings.open(name)
        anchor = theta = run.session.reach.holdings.model.fresh_adapters(0)
        for number, parts in enumerate(client.batches(0)):
            found = client.fit(theta, round_number=0, lr=LR, penalty=distance(anchor, 2.0), purpose=f"fit.{number}", steps=[parts] * 3)
            theta = found.tree
            anchor = {key: (leaf - 0.4 * (leaf.double() - theta[key].double())).float() for key, leaf in anchor.items()}
        assert number == 1
        assert equal(as_first(run.memory(name).tree("personal")), theta)
        assert equal(answers(run, name)["personal"].tree, theta)
        anchors[name] = anchor
    for key, leaf in run.state.items():
        torch.testing.assert_close(leaf, (anchors["ada"][key] + anchors["bo"][key]) / 2, rtol=0, atol=1e-7)


def test_pfedme_that_goes_all_the_way_sends_its_personal_model(place, tmp_path):
    run = begin(place, tmp_path, "pfedme", {"pull": 4.0, "rate": 0.25}, clients=("ada",)).go()
    assert equal(run.state, as_first(run.memory("ada").tree("personal")))


@pytest.mark.parametrize("options", [{"pull": 0.0}, {"rate": 0.1}, {"rate": 0.0}, {"inner": 0}])
def test_pfedmes_options_are_checked(place, options):
    with pytest.raises(ValueError, match=r"method.pull, method.rate, method.inner: .* at most 1 / pull"):
        load_recipe(with_options(place, "pfedme", options))
