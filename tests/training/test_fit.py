"""The training loop against an ordinary one."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
import torch

from fedgraft.bundle import Bundle
from fedgraft.training.fit import NotFiniteError, fit
from fedgraft.training.settings import TrainingSettings
from fedgraft.tree import clone, digest, equal, partition
from tests.conftest import PROVEN
from tests.training import plain
from tests.training.plain import EXPERTS, LR, batches, halves, leaves

KINDS = [("lora", "faithful"), ("full", "faithful"), ("lora", "preserving"), ("full", "preserving")]
SETTINGS = TrainingSettings()


def close(left, right, tolerance):
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}")


def run(model, tree, steps, settings=SETTINGS, *, seed=0, lr=LR, **options):
    """`fit`; a step may be one batch or a list of accumulation parts."""
    parts = [[step] if not isinstance(step, list) else step for step in steps]
    return fit(model, tree, parts, settings, lr=lr, seed=seed, experts=EXPERTS, **options)


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "clip": 0.01}])
def test_fit_is_the_plain_loop_bit_for_bit(tiny_graft, family, train, options):
    """Four steps with dropout, AdamW, clipping and the loss on response tokens alone; the losses too."""
    model, settings = tiny_graft(family, train=train, dropout=0.2), TrainingSettings(**options)
    start = leaves(model)
    before = digest(start)
    expected, losses = plain.train(model, start, batches(4), settings, seed=11)
    result = run(model, start, batches(4), settings, seed=11)
    assert equal(result.tree, expected)
    assert result.loss == pytest.approx(fmean(losses), rel=1e-6)
    assert result.tokens == sum(int(batch.mask.sum()) for batch in batches(4))
    assert result.moments == {}
    assert digest(start) == before
    assert not any(torch.equal(result.tree[key], start[key]) for key in start)


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize(("train", "form"), [*KINDS, ("full", "in_place")])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-9)])
def test_what_has_no_part_in_the_loss_and_a_fused_optimiser_change_nothing(tiny_graft, family, train, form, dtype, tolerance):
    """Neither padding nor, in the last MoE layer, prompts. To rounding: AdamW moves an entry by up to lr = 4e-5 a step."""
    model = tiny_graft(family, base={"dtype": dtype}, train=train, form=form)
    start = {key: leaf.to(dtype) for key, leaf in leaves(model).items()}
    expected, losses = plain.train(model, start, batches(4), SETTINGS, lr=4e-5, padded=True, fused=False)
    result = run(model, start, batches(4), lr=4e-5)
    close(result.tree, expected, tolerance)
    assert result.loss == pytest.approx(fmean(losses), rel=1e-6)


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize(("train", "form"), KINDS)
def test_frozen_weights_stand_and_the_model_is_left_as_it_was(tiny_graft, family, train, form):
    model = tiny_graft(family, train=train, form=form)
    before = model.frozen_digest()
    run(model, leaves(model), batches(2), TrainingSettings(checkpointing=True))
    assert model.frozen_digest() == before
    assert not any(module.training for module in model.base.model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.base.model.modules())
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in model._frozen.values())


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize(("train", "form"), KINDS)
def test_checkpointing_changes_nothing(tiny_graft, family, train, form):
    """The forward is run again in `backward`, where the leaves must still be in use; dropout is drawn again alike."""
    model = tiny_graft(family, train=train, form=form, dropout=0.2)
    results = [run(model, leaves(model), batches(3), TrainingSettings(checkpointing=on)).tree for on in (False, True)]
    close(*results, 1e-6)


@pytest.mark.parametrize("rows", [4, 3])
def test_accumulation_changes_nothing(tiny_graft, rows):
    """Halves of unequal numbers of response tokens are weighted by them."""
    model = tiny_graft("qwen2_moe")
    start = leaves(model)
    assert any(len({part.response_tokens for part in halves(batch)}) == 2 for batch in batches(3, rows))
    whole = run(model, start, batches(3, rows), lr=4e-5)
    parts = run(model, start, [halves(batch) for batch in batches(3, rows)], lr=4e-5)
    close(whole.tree, parts.tree, 1e-6)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.tokens == whole.tokens


def test_kept_optimizer_state_continues_the_same_run(tiny_graft):
    """Three calls of two steps that hand on AdamW's moments, through the codec, are one loop of six steps."""
    model, settings = tiny_graft("olmoe"), TrainingSettings(optimizer_state="kept", weight_decay=0.1)
    start = tree = leaves(model)
    expected, _ = plain.train(model, start, batches(6), settings)
    moments = None
    for first in (0, 2, 4):
        result = run(model, tree, batches(6)[first : first + 2], settings, moments=moments)
        tree, moments = result.tree, Bundle.decode(Bundle(trees=result.moments).encode()).trees
    assert equal(tree, expected)
    assert moments["step"].keys() == start.keys()
    assert {leaf.item() for leaf in moments["step"].values()} == {6}


def test_fresh_optimizer_starts_anew(tiny_graft):
    model = tiny_graft("olmoe")
    tree, _ = plain.train(model, leaves(model), batches(4)[:2], SETTINGS)
    tree, _ = plain.train(model, tree, batches(4)[2:], SETTINGS)
    first = run(model, leaves(model), batches(4)[:2])
    assert equal(run(model, first.tree, batches(4)[2:]).tree, tree)
    assert not equal(run(model, leaves(model), batches(4)).tree, tree)


def test_dropout_is_a_function_of_the_seed(tiny_graft):
    model = tiny_graft("olmoe", dropout=0.5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run(model, leaves(model), batches(2), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(run(model, leaves(model), batches(2), seed=3).tree, first.tree)
    assert not equal(run(model, leaves(model), batches(2), seed=4).tree, first.tree)


def test_every_step_is_reported_with_its_loss_and_nothing_else_changes(tiny_graft):
    model, heard = tiny_graft("olmoe", dropout=0.2), []
    tree, steps = leaves(model), batches(3)
    silent = run(model, tree, steps)
    told = run(model, tree, steps, report=lambda *words: heard.append(words))
    assert equal(silent.tree, told.tree)
    assert [(done, total) for done, total, _ in heard] == [(1, 3), (2, 3), (3, 3)]
    assert fmean(loss for *_, loss in heard) == pytest.approx(told.loss, abs=1e-12)


def test_without_dropout_the_seed_has_no_effect(tiny_graft):
    model = tiny_graft("olmoe")
    assert equal(run(model, leaves(model), batches(2), seed=3).tree, run(model, leaves(model), batches(2), seed=4).tree)


@pytest.mark.parametrize("poison", ["leaf", "gradient"])
def test_not_finite_stops_before_the_leaves_are_touched(tiny_graft, poison):
    """A NaN in the model shows in the loss; sqrt has the value 0 and an infinite slope at 0, so here only the gradient is NaN."""
    model = tiny_graft("olmoe")
    start = leaves(model)
    key = "layers.0.attention.q.A"
    if poison == "leaf":
        start[key][0, 0] = math.nan
    before = digest(start)
    penalty = {"leaf": None, "gradient": lambda tree: (tree[key].sum() * 0).sqrt()}[poison]
    with pytest.raises(NotFiniteError, match=r"(?s)the loss became .*nan.*lower training.lr"):
        run(model, start, batches(1), TrainingSettings(checkpointing=True), penalty=penalty)
    assert digest(start) == before
    assert not model.base.model.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.base.model.modules())
    with torch.no_grad():  # nothing stays in use
        assert model.base.model(batches(1)[0].ids).logits.isfinite().all()


@pytest.mark.parametrize("split", [lambda batch: [batch], halves])
def test_penalty_is_added_once_per_optimiser_step(tiny_graft, split):
    """mu/2 ||w - w0||^2 as part of the plain loop's loss; its value is no part of the reported loss."""
    model = tiny_graft("olmoe")
    start, calls = leaves(model), []
    origin = {key: leaf + 0.02 for key, leaf in start.items()}

    def penalty(tree):
        return 5.0 * sum((tree[key] - origin[key]).square().sum() for key in tree)

    expected, losses = plain.train(model, start, batches(3), SETTINGS, lr=4e-5, extra=lambda tree, batch: penalty(tree))
    parts = [split(batch) for batch in batches(3)]
    result = run(model, start, parts, lr=4e-5, penalty=lambda tree: (calls.append(sorted(tree)), penalty(tree))[1])
    close(result.tree, expected, 1e-6)
    assert calls == [sorted(start)] * 3
    assert result.loss == pytest.approx(fmean(losses), rel=1e-6)
    assert (
        result.tree["layers.0.side.0.mix.weight"] - run(model, start, parts, lr=4e-5).tree["layers.0.side.0.mix.weight"]
    ).abs().max() > 2e-5


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_router_aux_adds_the_load_balancing_loss(tiny_graft, family, checkpointing):
    """E sum_e f_e P_e over the real tokens of all layers (Fedus et al. 2021, eq. 4-6), from the routers' inputs, in the plain loop."""
    model, seen = tiny_graft(family), []
    for site in model.base.sites:
        site.router.register_forward_hook(lambda module, args, output: seen.append((args[0].reshape(-1, 32), module.weight)))

    def aux(tree, batch):
        real = batch.mask.flatten() == 1
        shares = torch.cat([torch.softmax(x @ weight.T, -1)[real] for x, weight in seen[-2:]])
        used = torch.zeros_like(shares).scatter(1, shares.topk(2).indices, 1.0).mean(0)
        return 0.5 * 8 * (used * shares.mean(0)).sum()

    start = leaves(model)
    expected, losses = plain.train(model, start, batches(3), SETTINGS, lr=4e-5, extra=aux, padded=True)
    result = run(model, start, batches(3), TrainingSettings(router_aux=0.5, checkpointing=checkpointing), lr=4e-5)
    close(result.tree, expected, 1e-6)
    assert result.loss == pytest.approx(fmean(losses), rel=1e-6)
    without = run(model, start, batches(3), lr=4e-5).tree["layers.0.attention.q.A"]
    assert (result.tree["layers.0.attention.q.A"] - without).abs().max() > 2e-5


@pytest.mark.parametrize("split", [lambda batch: [batch], halves])
def test_gradients_are_seen_and_changed_once_per_step_before_clipping(tiny_graft, split):
    """Adding 0.1 to every gradient is the plain loop with 0.1 times the sum of the leaves in its loss; what is seen is raw."""
    model = tiny_graft("olmoe")
    start, seen = leaves(model), []

    def shift(tree):
        seen.append({key: leaf.grad.clone() for key, leaf in tree.items()})
        for leaf in tree.values():
            leaf.grad += 0.1

    settings = TrainingSettings(clip=0.01)
    expected, _ = plain.train(
        model, start, batches(3), settings, lr=4e-5, extra=lambda tree, _: 0.1 * sum(leaf.sum() for leaf in tree.values())
    )
    close(run(model, start, [split(batch) for batch in batches(3)], settings, lr=4e-5, on_gradients=shift).tree, expected, 1e-6)
    assert len(seen) == 3
    tree = {key: leaf.clone().requires_grad_() for key, leaf in start.items()}
    with model.using(tree, EXPERTS):
        (batch,) = batches(1)
        logits = model.base.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()).backward()
    close(seen[0], {key: leaf.grad for key, leaf in tree.items()}, 1e-6)


def test_router_aux_is_refused_where_the_model_computes_none(tiny_graft):
    config = {"num_experts": 8, "moe_intermediate_size": 16, "intermediate_size": 32, "num_shared_experts": 1, "head_dim": 8}
    model = tiny_graft("glm4_moe", base={**config, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0})
    with pytest.raises(ValueError, match=r"training\.router_aux: this architecture computes no load-balancing loss"):
        run(model, leaves(model), batches(1), TrainingSettings(router_aux=0.1))


def test_a_router_that_adds_noise_while_training_routes_as_in_use(tiny_graft):
    """PhiMoE's router draws a uniform jitter in train mode; without dropout every seed then gives the same result."""
    model = tiny_graft("phimoe", base={"num_local_experts": 8, "intermediate_size": 16, "router_jitter_noise": 0.5}, gate_start="low")
    start = leaves(model)
    results = [run(model, start, batches(2), seed=seed).tree for seed in (0, 1)]
    assert equal(*results)


def test_fixed_leaves_act_and_stay(tiny_graft):
    """Training the side leaves with the attention leaves fixed: the plain loop whose attention leaves get no gradient."""
    model = tiny_graft("olmoe")
    attention, side = partition(leaves(model), lambda key: ".attention." in key)
    before = digest(attention)
    result = run(model, side, batches(2), fixed=attention)
    assert result.tree.keys() == side.keys()
    assert digest(attention) == before
    assert all(leaf.grad is None and not leaf.requires_grad for leaf in attention.values())
    assert not equal(result.tree, run(model, side, batches(2)).tree)


def test_bfloat16_keeps_leaves_and_moments_in_float32(tiny_graft):
    model = tiny_graft("olmoe")
    start = leaves(model)
    settings = TrainingSettings(precision="bf16", optimizer_state="kept")
    result, exact = run(model, start, batches(3), settings, lr=4e-5), run(model, start, batches(3), lr=4e-5)
    assert {leaf.dtype for tree in (result.tree, *result.moments.values()) for leaf in tree.values()} == {torch.float32}
    assert not equal(result.tree, exact.tree)
    assert result.loss == pytest.approx(exact.loss, rel=0.02)
    close(result.tree, exact.tree, 2 * 3 * 4e-5)  # AdamW moves by at most about lr a step, here in either direction


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bfloat16_base_is_trained_alike(tiny_graft, precision):
    model = tiny_graft("qwen2_moe", base={"dtype": torch.bfloat16})
    result = run(model, leaves(model), batches(3), TrainingSettings(precision=precision))
    exact = tiny_graft("qwen2_moe")
    assert {leaf.dtype for leaf in result.tree.values()} == {torch.float32}
    assert result.loss == pytest.approx(run(exact, leaves(exact), batches(3)).loss, rel=0.05)


def test_a_batch_without_response_tokens_has_no_loss(tiny_graft):
    """A prompt that fills the whole row: loss 0, and AdamW without a gradient stays where it is."""
    model = tiny_graft("olmoe")
    (batch,) = batches(1)
    batch.labels.fill_(-100)
    result = run(model, leaves(model), [batch])
    assert result.loss == 0
    assert equal(result.tree, clone(leaves(model)))


def test_training_lowers_the_loss(tiny_graft):
    """Twenty steps on one batch of 4 short rows can be learnt nearly by heart."""
    model = tiny_graft("mixtral")
    result = run(model, leaves(model), batches(1) * 20, lr=1e-2)
    after = run(model, result.tree, batches(1)).loss
    assert after < 0.5 * run(model, leaves(model), batches(1)).loss
