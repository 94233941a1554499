"""Clients trained at once against the same clients one after another."""

from __future__ import annotations

import math
import threading

import pytest
import torch

from fedgraft.bundle import Bundle
from fedgraft.data.batches import Batch, stacked
from fedgraft.data.example import Example
from fedgraft.data.partition import ClientData
from fedgraft.data.settings import DataSettings
from fedgraft.methods.method import personal_leaves, settled
from fedgraft.recipe import load_recipe
from fedgraft.selection.settings import SelectionSettings
from fedgraft.training import cohort
from fedgraft.training.client import Client
from fedgraft.training.cohort import obstacle, together
from fedgraft.training.fit import NotFiniteError, fit
from fedgraft.training.settings import TrainingSettings
from fedgraft.tree import equal, partition
from tests.conftest import PROVEN
from tests.training.plain import EXPERTS, batches, halves, leaves

NAMES = ("ada", "bo", "cy")
KINDS = [("lora", "faithful"), ("full", "faithful"), ("lora", "preserving"), ("lora", "in_place")]


def close(left, right, tolerance):
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}")


def shorter(batch, by):
    return Batch(batch.ids[:, :-by], batch.mask[:, :-by], batch.labels[:, :-by]) if by else batch


def works(model, settings, seeds=(0, 1, 2), *, lr=4e-5, dtype=torch.float32, **options):
    """Calls of `fit` for clients who differ in leaves, experts, rows, lengths, dropout and, the third, in its number of steps."""
    experts = {0: EXPERTS, 1: [[1], [7]], 2: [[5], [0]]}

    def work(seed):
        start = {key: leaf.to(dtype) for key, leaf in leaves(model, seed, experts[seed]).items()}
        steps = [
            halves(shorter(batch, seed)) if settings.accumulation == 2 else [shorter(batch, seed)] for batch in batches(3, 2 + seed, seed)
        ]
        steps = steps[: 2 if seed == 2 else 3]
        further = {name: option[seed] for name, option in options.items() if seed in option}
        return lambda passes: fit(model, start, steps, settings, lr=lr, seed=seed, experts=experts[seed], passes=passes, **further)

    return [work(seed) for seed in seeds]


def one_by_one(calls):
    return [call(None) for call in calls]


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize(("train", "form"), KINDS)
def test_a_cohort_is_one_after_another_to_rounding(tiny_graft, family, train, form):
    """Unequal rows, lengths, steps, experts and dropout; 1e-9 in float64."""
    model = tiny_graft(family, base={"dtype": torch.float64}, train=train, form=form, dropout=0.2)
    calls = works(model, TrainingSettings(clip=0.05), dtype=torch.float64)
    for alone, joint in zip(one_by_one(calls), together(calls), strict=True):
        close(joint.tree, alone.tree, 1e-9)
        assert joint.loss == pytest.approx(alone.loss, abs=1e-6)  # logits become fp32 for the loss
        assert joint.tokens == alone.tokens
    assert not any(module.training for module in model.base.model.modules())


@pytest.mark.parametrize(("train", "form"), KINDS)
def test_a_client_without_response_tokens_trains_beside_others(tiny_graft, train, form):
    """The last MoE layer then sees none of its tokens; it alone has loss 0 and stays where it is."""
    model = tiny_graft("qwen2_moe", base={"dtype": torch.float64}, train=train, form=form)

    def work(seed):
        start = {key: leaf.double() for key, leaf in leaves(model, seed).items()}
        steps = [[batch] for batch in batches(2, 2 + seed, seed)]
        if seed == 1:
            for (batch,) in steps:
                batch.labels.fill_(-100)
        return lambda passes: fit(model, start, steps, TrainingSettings(), lr=4e-5, seed=seed, experts=EXPERTS, passes=passes)

    calls = [work(seed) for seed in range(3)]
    results = together(calls)
    for alone, joint in zip(one_by_one(calls), results, strict=True):
        close(joint.tree, alone.tree, 1e-9)
    assert results[1].loss == 0
    close(results[1].tree, {key: leaf.double() for key, leaf in leaves(model, 1).items()}, 1e-12)


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"accumulation": 2}, {"weight_decay": 0.1, "optimizer_state": "kept"}])
def test_in_single_precision_it_is_within_a_twentieth_of_a_step(tiny_graft, options):
    """AdamW moves an entry by up to lr = 4e-5 a step; with checkpointing the dropout of the first forward comes again."""
    model, settings = tiny_graft("qwen2_moe", dropout=0.2), TrainingSettings(**options)
    calls = works(model, settings)
    for alone, joint in zip(one_by_one(calls), together(calls), strict=True):
        close(joint.tree, alone.tree, 2e-6)
        assert joint.loss == pytest.approx(alone.loss, abs=1e-6)
        assert joint.moments.keys() == alone.moments.keys()
        for name in joint.moments:
            close(joint.moments[name], alone.moments[name], 1e-5)


def test_with_reduced_precision_it_is_near(tiny_graft):
    """bf16 has 8 bits; what rounds differently moves an entry by no more than the steps it makes."""
    model, settings = tiny_graft("qwen2_moe"), TrainingSettings(precision="bf16")
    calls = works(model, settings)
    for alone, joint in zip(one_by_one(calls), together(calls), strict=True):
        assert joint.loss == pytest.approx(alone.loss, rel=0.01)
        close(joint.tree, alone.tree, 3 * 2 * 4e-5)


def test_penalties_and_hooks_are_each_clients_own(tiny_graft):
    model = tiny_graft("olmoe", base={"dtype": torch.float64})
    penalties = {1: lambda tree: 5.0 * sum(leaf.square().sum() for leaf in tree.values())}

    def shift(tree):
        for leaf in tree.values():
            leaf.grad += 0.1

    calls = works(model, TrainingSettings(), dtype=torch.float64, penalty=penalties, on_gradients={2: shift})
    for alone, joint in zip(one_by_one(calls), together(calls), strict=True):
        close(joint.tree, alone.tree, 1e-9)


def client_of(model, name, number, **training):
    """Its answers differ in length from the others'."""
    rows = [Example(str(i), "sum", f"say {i}", "", f"{name} {i} " * (1 + number + i % 3)) for i in range(5)]
    settings = TrainingSettings(**{"steps": 3, "least_steps": 1, "batch_size": 2, "clip": 0.05, "optimizer_state": "kept"} | training)
    data = ClientData(name, rows, [], [])
    return Client(data=data, model=model, seed=3, data_settings=DataSettings(), training=settings, selection=SelectionSettings())


def rounds(method, model, clients, jointly):
    """Two rounds of the clients' half of a method, from float64 leaves; what each remembers and replied last."""

    def package(number, control):
        trees = {"shared": shared, **({"control": control} if control else {})}
        return Bundle(trees=trees, facts={"round": number, "lr": 1e-3, "heard": None})

    opened = [client_of(model, name, number) for number, name in enumerate(clients)]
    for client in opened:
        client.memory = Bundle(facts={"experts": [[5], [2]]} if "side" in method.places else {})
        own = {key: leaf.double() for key, leaf in personal_leaves(method, client).items()}
        client.memory = Bundle(trees={"personal": own} if own else {}, facts=client.memory.facts)
    fresh = {key: leaf.double() for key, leaf in method.fresh(method, opened[0]).items()}
    shared = partition(fresh, lambda key: not method.personal(key))[0]
    replies = []
    for number in range(2):
        control = {key: torch.full_like(leaf, 0.01) for key, leaf in shared.items()} if number else {}

        sent = package(number, control)

        def work(client, sent=sent):
            def run(passes):
                if passes is not None:
                    client.passes = passes
                return method.train(method, client, sent)

            return run

        calls = [work(client) for client in opened]
        replies = together(calls) if jointly else one_by_one(calls)
    return [(client.memory, reply) for client, reply in zip(opened, replies, strict=True)]


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold", "ditto", "fedrep", "flex", "apfl", "pfedme", "fedper", "ffa_lora"])
def test_methods_run_in_cohorts_as_they_are(tiny_graft, name):
    """Two rounds with unequal steps and lengths, dropout, clipping and kept moments; 1e-9 in float64, whatever the method remembers."""
    model = tiny_graft("qwen2_moe", base={"dtype": torch.float64}, dropout=0.1)
    method = settled(load_recipe({"method": {"name": name}}).build_method(), model.base, model.lora_settings, list(NAMES))
    expected = rounds(method, model, NAMES, jointly=False)
    for (memory, reply), (memory_alone, reply_alone) in zip(rounds(method, model, NAMES, jointly=True), expected, strict=True):
        assert memory.trees.keys() == memory_alone.trees.keys()
        for tree in memory.trees:
            close(memory.tree(tree), memory_alone.tree(tree), 1e-9 if name != "scaffold" or tree != "control" else 1e-7)
        close(reply.tree("shared"), reply_alone.tree("shared"), 1e-9)
        assert reply.facts["loss"] == pytest.approx(reply_alone.facts["loss"], abs=1e-6)
        assert reply.facts["tokens"] == reply_alone.facts["tokens"]


@pytest.mark.parametrize("where", ["leaf", "penalty"])
def test_a_client_that_is_not_finite_leaves_and_harms_nobody(tiny_graft, where):
    model = tiny_graft("mixtral", base={"dtype": torch.float64}, dropout=0.1)
    good = works(model, TrainingSettings(), dtype=torch.float64)
    poison = {1: lambda tree: sum(leaf.sum() for leaf in tree.values()) * math.nan}
    bad = works(model, TrainingSettings(), dtype=torch.float64, penalty=poison)[1]
    if where == "leaf":
        start = {key: leaf.double() for key, leaf in leaves(model).items()}
        start["layers.0.attention.q.A"][0, 0] = math.nan

        def bad(passes):
            return fit(model, start, [[batch] for batch in batches(3)], TrainingSettings(), lr=1e-3, seed=1, experts=EXPERTS, passes=passes)

    first, failed, last = together([good[0], bad, good[2]])
    assert isinstance(failed, NotFiniteError)
    for joint, alone in zip((first, last), one_by_one([good[0], good[2]]), strict=True):
        close(joint.tree, alone.tree, 1e-9)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["client", "forward"])
def test_an_error_ends_the_cohort_and_its_threads(tiny_graft, monkeypatch, error, where):
    model, before = tiny_graft("olmoe"), threading.active_count()

    def raises(*_):
        raise error

    if where == "forward":
        monkeypatch.setattr(cohort, "_joint", raises)
    with pytest.raises(error):
        together(works(model, TrainingSettings(), on_gradients={1: raises} if where == "client" else {}))
    assert threading.active_count() == before
    with torch.no_grad():  # nothing stays in use
        assert model.base.model(batches(1)[0].ids).logits.isfinite().all()


def test_one_alone_in_a_cohort_has_the_same_dropout(tiny_graft):
    """Bit for bit: same shapes, same draws."""
    model = tiny_graft("olmoe", dropout=0.3)
    call = works(model, TrainingSettings())[0]
    (joint,) = together([call])
    close(joint.tree, call(None).tree, 1e-7)
    before = torch.get_rng_state()
    together([call])
    assert torch.equal(torch.get_rng_state(), before)


def test_stacked_pads_to_the_longest():
    short, long = shorter(batches(1, 2)[0], 3), batches(1, 1)[0]
    whole = stacked([short, long], pad_id=9)
    assert whole.ids.shape == whole.mask.shape == whole.labels.shape == (3, 12)
    assert whole.ids[:2, 9:].eq(9).all()
    assert whole.mask[:2, 9:].eq(0).all()
    assert whole.labels[:2, 9:].eq(-100).all()
    assert torch.equal(whole.targets, torch.cat([short.targets, long.targets]))
    assert equal({"ids": whole.ids[2:]}, {"ids": long.ids})


@pytest.mark.parametrize(
    ("family", "config", "lora", "training", "reason"),
    [
        ("qwen2_moe", {}, {}, {}, ""),
        ("olmoe", {}, {}, {"router_aux": 0.1}, "router_aux"),
        ("olmoe", {}, {"targets": ("q", "router")}, {}, "'router'"),
        ("olmoe", {}, {"targets": ("q", "experts")}, {}, "'experts'"),
        ("olmoe", {"attention_dropout": 0.1}, {}, {}, "dropout of its own (attention_dropout)"),
        ("mixtral", {"rope_parameters": {"rope_type": "dynamic"}}, {}, {}, "rotary"),
    ],
)
def test_what_mixes_rows_or_has_no_lanes_is_told(tiny_graft, family, config, lora, training, reason):
    model = tiny_graft(family, **lora)
    for name, value in config.items():
        setattr(model.base.model.config, name, value)
    found = obstacle(model, TrainingSettings(**training))
    assert bool(found) == bool(reason)
    assert reason in found


def test_a_layer_that_sees_its_tokens_otherwise_is_refused(tiny_graft):
    """A model could hand a layer tokens in an order that says nothing about rows."""
    model = tiny_graft("olmoe")
    layer = model.base.model.get_submodule(model.base.projections[0].path)
    layer.register_forward_pre_hook(lambda module, args: (args[0][:, None],))
    with pytest.raises(ValueError, match=r"engine\.cohort: a layer of this model sees .* for 9 rows of 12 tokens; set it to 1"):
        together(works(model, TrainingSettings()))
