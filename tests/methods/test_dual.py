"""FedDPA and FDLoRA: a shared and an own LoRA, blended for each row or fused."""

from __future__ import annotations

import pytest
import torch

from fedgraft.address import MIX, as_first, as_own
from fedgraft.data.batches import encode, prompt_ids
from fedgraft.methods import feddpa
from fedgraft.methods.fdlora import search
from fedgraft.recipe import load_recipe
from fedgraft.runner import run as run_recipe
from fedgraft.seeds import numpy_rng
from fedgraft.tree import equal
from tests.methods.harness import ROWS, answers, begin, sent_addresses
from tests.methods.test_identities import LR

KEPT = {"federation": {"clients_per_round": 2}, "training": {"optimizer_state": "kept"}}
IDS = torch.arange(24).reshape(2, 12)


def logits(run, tree):
    model = run.session.reach.holdings.model
    with model.using(tree, []), torch.no_grad():
        return model.base.model(IDS).logits


# FedDPA


@pytest.mark.parametrize("variant", ["F", "T"])
def test_feddpas_shared_path_is_fedavg_and_its_ends_predict_as_fedavg_and_as_the_own_adapter(start, place, tmp_path, variant):
    """Bit for bit, with dropout, kept moments and 2 of 3 clients a round."""
    plain = start("fedavg", **KEPT).go()
    for share in (0.0, 1.0):
        run = begin(place, tmp_path / str(share), "feddpa", {"variant": variant, "share": share}, **KEPT).go()
        assert equal(run.state, plain.state)
        assert sent_addresses(run) == sent_addresses(plain)
        for name in ROWS:
            own = as_first(run.memory(name).tree("personal"))
            if not own:  # it was never drawn
                continue
            found = logits(run, answers(run, name)["personal"].tree)
            assert torch.equal(found, logits(run, plain.state if share == 0 else own))
            assert not torch.equal(logits(run, plain.state), logits(run, own))


def test_feddpa_fs_own_adapter_is_that_of_fine_tuned_fedavg(start, place, tmp_path):
    tuned = begin(place, tmp_path, "fedavg_ft", {"rounds": 2, "lr": 5e-4}).go()
    run = begin(place, tmp_path, "feddpa", {"rounds": 2, "lr": 5e-4}).go()
    assert all(equal(run.memory(name).tree("personal"), tuned.memory(name).tree("personal")) for name in ROWS)


def test_feddpa_ts_own_adapter_trains_beside_the_received_leaves(place, tmp_path):
    """One client, two rounds by hand; a share of 1 trains it alone."""
    run = begin(
        place, tmp_path, "feddpa", {"variant": "T", "mix": 0.3}, clients=("ada",), federation={"rounds": 2}, training={"lr_min": LR}
    ).go()
    client = run.session.reach.holdings.open("ada")
    shared, own = run.session.reach.holdings.model.fresh_adapters(0), as_own(run.session.reach.holdings.model.fresh_adapters(0))
    for number in (0, 1):
        own = client.fit(own, round_number=number, lr=LR, fixed=shared | {MIX: torch.tensor(0.3)}).tree
        shared = client.fit(shared, round_number=number, lr=LR).tree
    assert equal(run.state, shared)
    assert equal(run.memory("ada").tree("personal"), own)


@pytest.mark.parametrize("instances", [2, 100])
def test_feddpas_shares_are_mean_cosines_of_last_states(place, tmp_path, instances):
    """One prompt at a time, from the hidden states that transformers gives."""
    run = begin(place, tmp_path, "feddpa", {"variant": "T", "scale": 0.8, "instances": instances}).go()
    client, base = run.session.reach.holdings.open("bo"), run.session.reach.holdings.model.base
    own = as_first(run.memory("bo").tree("personal"))

    def state(example):
        ids = prompt_ids(example, base.tokenizer, client.data_settings.template, client.data_settings.max_length)
        with run.session.reach.holdings.model.using(own, []), torch.no_grad():
            return ids, base.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1].double()

    drawn = numpy_rng(client.seed, "instances", "bo").permutation(client.examples)[:instances]
    assert len(drawn) == min(instances, ROWS["bo"])
    known = [state(client.data.train[row])[1] for row in drawn]
    rows = [*client.data.test, *client.data.validation, *client.data.train[:3]]
    prompts, states = zip(*map(state, rows), strict=True)
    wanted = [0.8 * sum(float(one @ other / one.norm() / other.norm()) for other in known) / len(known) for one in states]
    found = answers(run, "bo")["personal"].shares(prompts)
    assert all(0 < share < 0.8 for share in wanted)
    torch.testing.assert_close(found.double(), torch.tensor(wanted).double(), rtol=1e-4, atol=1e-5)
    assert len(set(found.tolist())) > 1
    none = begin(place, tmp_path / "none", "feddpa", {"variant": "T", "scale": 0}).go()
    assert not answers(none, "bo")["personal"].shares(prompts).any()


def test_a_cosine_below_zero_gives_no_share(place, tmp_path, monkeypatch):
    """Cosines of 1, 0, -1 with the one known state."""
    run = begin(place, tmp_path, "feddpa", {"variant": "T", "instances": 1}, federation={"rounds": 1}).go()
    states = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    monkeypatch.setattr(feddpa, "last_states", lambda client, tree, prompts: states[: len(prompts)])
    assert answers(run, "bo")["personal"].shares([[1], [2], [3]]).tolist() == [0.5, 0.0, 0.0]


@pytest.mark.parametrize("options", [{"variant": "G"}, {"scale": 1.1}, {"instances": 0}, {"share": -0.1}, {"rounds": 0}, {"lr": 0}])
def test_feddpas_options_are_checked(place, options):
    with pytest.raises(ValueError, match=f"method.{next(iter(options))}: Input should be"):
        load_recipe(place.recipe("feddpa", options=options))


# FDLoRA


def test_fdlora_without_its_parts_is_fedavg(start, place, tmp_path):
    """Rate 1, no momentum, weights 1 and 0: state, memories of the shared leaves, packages and predictions; and the other end is local."""
    options = {"server_lr": 1, "beta": 0, "sync": 0, "weights": [1, 0]}
    plain, alone = start("fedavg", **KEPT).go(), start("local", **KEPT).go()
    run = begin(place, tmp_path, "fdlora", options, **KEPT).go()
    other = begin(place, tmp_path / "other", "fdlora", options | {"weights": [0, 1]}, **KEPT).go()
    assert equal(run.state, plain.state)
    assert sent_addresses(run) == sent_addresses(plain)
    for name in ROWS:
        found = answers(run, name)["personal"].tree
        assert all(torch.equal(leaf, plain.state[key]) for key, leaf in found.items())
        if "personal" in alone.memory(name).trees:
            assert equal(as_first(run.memory(name).tree("personal")), alone.memory(name).tree("personal"))
            found = answers(other, name)["personal"].tree
            assert all(torch.equal(leaf, alone.memory(name).tree("personal")[key]) for key, leaf in found.items())


def test_the_own_lora_starts_anew_from_the_received_one(place, tmp_path):
    """One client, rounds 0 to 3 by hand, anew in rounds 2 only."""
    run = begin(
        place, tmp_path, "fdlora", {"sync": 2, "weights": [1, 0]}, clients=("ada",), federation={"rounds": 4}, training={"lr_min": LR}
    ).go()
    client = run.session.reach.holdings.open("ada")
    shared = own = run.session.reach.holdings.model.fresh_adapters(0)
    momentum = {key: torch.zeros_like(leaf, dtype=torch.float64) for key, leaf in shared.items()}
    for number in range(4):
        own = client.fit(shared if number == 2 else own, round_number=number, lr=LR).tree
        delta = {key: leaf.double() - shared[key].double() for key, leaf in client.fit(shared, round_number=number, lr=LR).tree.items()}
        momentum = {key: 0.9 * momentum[key] + change for key, change in delta.items()}
        shared = {key: (leaf.double() + 0.7 * (delta[key] + 0.9 * momentum[key])).float() for key, leaf in shared.items()}
    assert equal(as_first(run.memory("ada").tree("personal")), own)
    for key, leaf in run.state.items():
        torch.testing.assert_close(leaf, shared[key], rtol=0, atol=1e-7)


def test_fused_are_the_factors(place, tmp_path):
    """A router's rows, trained in full, keep their pretrained part."""
    run = begin(place, tmp_path, "fdlora", {"weights": [0.6, 0.7]}, federation={"rounds": 1}, lora={"targets": ["q", "router"]}).go()
    own, found = as_first(run.memory("cy").tree("personal")), answers(run, "cy")["personal"].tree
    fresh = run.session.reach.holdings.model.fresh_adapters(0)
    for key, leaf in found.items():
        base = fresh[key] if "router" in key else 0
        torch.testing.assert_close(leaf, base + 0.6 * (run.state[key] - base) + 0.7 * (own[key] - base), rtol=1e-5, atol=1e-6)
    assert {key[-2:] for key in found} == {".A", ".B", "ht"}


def test_the_weights_are_the_best_found_on_validation_rows(place, tmp_path):
    """No pair on a grid around does better by much, and rows of the test split are never read."""
    run = begin(place, tmp_path, "fdlora", {"l1": 0, "evaluations": 60})
    opened = run.session.engine.site.open_client

    def sealed(name):
        client = opened(name)
        client.data = Sealed(client.data) if run.session.stand.phase == "finishing" else client.data
        return client

    run.session.engine.site.open_client = sealed
    run.go()
    for name in ROWS:
        client, shared = run.session.reach.holdings.open(name), run.state
        own, (g, p) = as_first(run.memory(name).tree("personal")), run.memory(name).facts["weights"]
        assert equal(answers(run, name)["personal"].tree, {key: g * leaf + p * own[key] for key, leaf in shared.items()})

        def loss(g, p, client=client, own=own, shared=shared):
            tree = {key: g * leaf + p * own[key] for key, leaf in shared.items()}
            return by_hand(client, tree, client.data.validation)

        best = min(loss(x / 4, y / 4) for x in range(-6, 7, 2) for y in range(-6, 7, 2))
        assert loss(g, p) <= best + 1e-3
        assert loss(g, p) < min(loss(1, 0), loss(0, 1))


def by_hand(client, tree, rows):
    """Mean nats per response token, one row at a time."""
    total, tokens = 0.0, 0
    for example in rows:
        row, _ = encode(example, client.model.base.tokenizer, client.data_settings.template, client.data_settings.max_length)
        with client.model.using(tree, []), torch.no_grad():
            found = client.model.base.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        total -= sum(float(found[at - 1, row.ids[at]]) for at in range(row.start, len(row.ids)))
        tokens += len(row.ids) - row.start
    return total / tokens


class Sealed:
    """A client's rows whose test split must not be looked at."""

    def __init__(self, data):
        self.name, self.train, self.validation = data.name, data.train, data.validation

    @property
    def test(self):
        raise AssertionError("the test rows were read")

    def sealed(self):
        """As the rows are that a client is asked with while it finishes."""
        return self


def test_the_search_finds_a_minimum_inside_its_bounds():
    assert search(lambda g, p: (g - 0.3) ** 2 + (p + 0.4) ** 2, 200) == pytest.approx((0.3, -0.4), abs=1e-3)
    assert search(lambda g, p: -g - p, 200) == pytest.approx((1.5, 1.5))
    tried = []
    search(lambda g, p: tried.append((g, p)) or g, 10)
    assert tried[:3] == [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]
    assert len(tried) <= 10


def test_a_client_whose_search_is_lost_predicts_with_the_shared_leaves(place, tmp_path):
    run = begin(place, tmp_path, "fdlora", {}, federation={"rounds": 1})
    run.session.engine.site.questions = {**run.session.engine.site.questions, "finish": lambda client, package: package}
    run.go()
    assert all(torch.equal(leaf, run.state[key]) for key, leaf in answers(run, "bo")["personal"].tree.items())


def test_clients_without_validation_rows_are_told_so_before_they_train(place, tmp_path):
    recipe = place.recipe("fdlora", data={"validation_rows": 0})
    with pytest.raises(ValueError, match=r"client 'ada' has no validation rows, .* or set method.weights"):
        run_recipe(recipe, out=tmp_path / "run")
    recipe["method"] |= {"weights": [0.5, 0.5]}
    assert run_recipe(recipe | {"federation": {"rounds": 1}}, out=tmp_path / "fixed").finished
