"""Each criterion against brute force, an identity or a profile written by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from fedgraft import plugins
from fedgraft.selection.choose import choose, shares
from fedgraft.selection.profile import Profile, measure
from tests.conftest import PROVEN
from tests.selection import brute
from tests.selection.brute import rows

RNG = np.random.default_rng(0)


PER_EXPERT = ("output_sq_LE", "dot_LE", "raw_dot_LE", "count_LE", "mass_LE", "strength_LE")


def profile_of(**sums: object) -> Profile:
    """One layer of three experts; what is not given is 1."""
    ones = {name: torch.ones(1, 3, dtype=torch.float64) for name in PER_EXPERT}
    ones |= {name: torch.ones(1, dtype=torch.float64) for name in ("full_sq_L", "raw_full_sq_L")}
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
    return Profile(**(ones | given), tokens=10)


def scores(name: str, profile: Profile) -> list[float]:
    return plugins.load("criterion", name).score(profile)[0].tolist()


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize("seed", [0, 1])
def test_one_expert_by_streaming_is_the_best_masked_router(tiny_base, family, seed):
    base, batch = tiny_base(family, seed=seed), rows(20, 11, seed=seed)
    best = []
    for site, x in zip(base.sites, brute.layer_inputs(base, batch), strict=True):
        best.append([int(np.argmin([brute.subset_loss(base, site, x, [expert]) for expert in range(8)]))])
    assert choose("reconstruction", measure(base, [batch], 1000), 1, RNG) == best


@pytest.mark.parametrize("family", PROVEN)
def test_raw_form_is_the_best_masked_router_against_raw_weights(tiny_base, family):
    base, batch = tiny_base(family), rows(20, 11)
    module = plugins.load("criterion", "raw_reconstruction")
    score_LE = module.score(measure(base, [batch], 1000))
    for layer, (site, x) in enumerate(zip(base.sites, brute.layer_inputs(base, batch), strict=True)):
        losses = torch.tensor([brute.subset_loss(base, site, x, [expert], full=brute.as_is) for expert in range(8)], dtype=torch.float64)
        torch.testing.assert_close(-score_LE[layer], losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", PROVEN)
def test_scale_free_form_is_least_squares(tiny_base, family):
    """Its loss is the smallest ||R - a O_e||^2 on a fine grid of a >= 0, within the grid's resolution."""
    base, batch = tiny_base(family), rows(20, 11)
    score_LE = plugins.load("criterion", "scale_free_reconstruction").score(measure(base, [batch], 1000))
    grid = torch.linspace(0, 3, 3001, dtype=torch.float64)
    for layer, (site, x) in enumerate(zip(base.sites, brute.layer_inputs(base, batch), strict=True)):
        full = brute.routed(base, site, x, brute.unit_sum)
        for expert in range(8):
            out = brute.routed(base, site, x, brute.masked_to([expert]))
            least = min(float((full - a * out).square().sum()) for a in grid[::100])
            fine = (full.square().sum() - 2 * grid * (full * out).sum() + grid.square() * out.square().sum()).min()
            assert -score_LE[layer, expert] <= least * (1 + 1e-6)
            torch.testing.assert_close(-score_LE[layer, expert], fine, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_takes_the_best_extension_and_stays_near_the_best_subset(tiny_base, family, seed):
    """Every step by forwards of the masked router; the best of all C(8, r) subsets bounds it from below.

    The factor 2.5 is no theorem: over 36 such models of two layers greedy's loss was the best subset's in the median, 1.07 (r = 2) and 1.05
    (r = 3) times it in the mean, 2.23 and 1.55 times at worst.
    """
    base, batch = tiny_base(family, seed=seed), rows(20, 11, seed=seed)
    profile = measure(base, [batch], 1000, gram=True)
    chosen = choose("reconstruction", profile, 3, RNG)
    assert [experts[:2] for experts in chosen] == choose("reconstruction", profile, 2, RNG)
    assert [experts[:1] for experts in chosen] == choose("reconstruction", profile, 1, RNG)
    for site, x, experts in zip(base.sites, brute.layer_inputs(base, batch), chosen, strict=True):
        for r in (2, 3):
            loss = {subset: brute.subset_loss(base, site, x, subset) for subset in combinations(range(8), r)}
            before = experts[: r - 1]
            extensions = {expert: loss[tuple(sorted([*before, expert]))] for expert in range(8) if expert not in before}
            assert experts[r - 1] == min(extensions, key=extensions.__getitem__)
            greedy, best = extensions[experts[r - 1]], min(loss.values())
            assert best <= greedy <= 2.5 * best


@pytest.mark.parametrize("seed", range(6))
def test_greedy_with_correlated_experts(seed):
    """Outputs of two dimensions overlap strongly, so the cross terms decide; every step by the definition of R_S."""
    draw = torch.Generator().manual_seed(seed)
    outputs = torch.randn(12, 6, 2, generator=draw).double()  # [T, E, H]
    full = torch.randn(12, 2, generator=draw).double()
    probability = torch.randn(12, 6, generator=draw).softmax(-1)
    dot = torch.einsum("th,teh->te", full, outputs)
    sums = {"full_sq_L": full.square().sum()[None], "output_sq_LE": outputs.square().sum((0, 2))[None], "dot_LE": dot.sum(0)[None]}
    tokens = {"token_scores": probability[None], "token_dot": dot[None], "token_gram": (outputs @ outputs.mT).float()[None]}
    profile = Profile(**{**vars(profile_of()), **sums, "tokens": 12, **tokens})

    def loss(subset: list[int]) -> float:
        weight = probability[:, subset].double() / probability[:, subset].double().sum(-1, keepdim=True)
        return float((full - (weight[..., None] * outputs[:, subset]).sum(1)).square().sum())

    expected: list[int] = []
    while len(expected) < 4:
        expected.append(min((expert for expert in range(6) if expert not in expected), key=lambda expert: loss([*expected, expert])))
    assert choose("reconstruction", profile, 4, RNG) == [expected]


def test_all_experts_are_a_permutation(tiny_base):
    profile = measure(tiny_base("olmoe"), [rows(20)], 20, gram=True)
    assert [sorted(experts) for experts in choose("reconstruction", profile, 8, RNG)] == [list(range(8))] * 2


def test_probabilities_of_zero_do_not_spoil_the_greedy_choice():
    """Orthogonal unit outputs, R = (O_0 + O_2) / 2, and a router that underflowed everywhere: equal weights; {0, 2} rebuilds R exactly."""
    gram = torch.eye(3).expand(1, 2, 3, 3)
    dot = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64).expand(1, 2, 3)
    sums = {"full_sq_L": [1.0], "output_sq_LE": [[2.0, 2.0, 2.0]], "dot_LE": [[1.0, 0.0, 1.0]]}
    flat = profile_of(**sums)
    profile = Profile(**{**vars(flat), "tokens": 2, "token_scores": torch.zeros(1, 2, 3), "token_dot": dot, "token_gram": gram})
    assert choose("reconstruction", profile, 2, RNG) == [[0, 2]]


def saturate(base, experts: list[int]) -> None:
    """Make every layer's routed output that of one expert alone.

    Coordinate 0 of the residual stream stays constant and positive (no block writes to it), so a router row along it saturates the softmax
    to exactly 1 at that expert.
    """
    base.model.model.embed_tokens.weight.data[:, 0] = 10.0
    for site, expert in zip(base.sites, experts, strict=True):
        decoder = base.model.model.layers[site.layer]
        decoder.self_attn.o_proj.weight.data[0] = 0
        site.experts.down_proj.data[:, 0] = 0
        for shared in site.shared:
            if hasattr(shared, "down_proj"):  # else it is the gate of the shared expert
                shared.down_proj.weight.data[0] = 0
        site.router.weight.data[expert] = 0
        site.router.weight.data[expert, 0] = 1000.0


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize("criterion", ["reconstruction", "raw_reconstruction", "scale_free_reconstruction", "gate_mass"])
def test_a_block_that_equals_one_expert_selects_it(tiny_base, family, criterion):
    base = tiny_base(family)
    saturate(base, [6, 3])
    profile = measure(base, [rows(20, 11)], 31)
    assert choose(criterion, profile, 1, RNG) == [[6], [3]]
    exact = profile.error_LE[[0, 1], [6, 3]] / profile.full_sq_L
    assert exact.abs().max() < 1e-6


def test_reconstruction_differs_from_the_most_used_expert():
    """Expert 0 is used most; expert 1 rebuilds R."""
    profile = profile_of(
        full_sq_L=[4.0], output_sq_LE=[[4.0, 4.0, 4.0]], dot_LE=[[1.0, 3.5, 2.0]], count_LE=[[9, 1, 0]], mass_LE=[[4.0, 0.5, 0]]
    )
    assert choose("reconstruction", profile, 1, RNG) == [[1]]
    assert choose("activation_frequency", profile, 1, RNG) == choose("gate_mass", profile, 1, RNG) == [[0]]


def test_raw_form_favours_small_norms_where_the_normalised_does_not():
    """R = O_0 with raw weights of sum 0.2: the raw distance to O_0 is 0.8 ||O_0||, to a near-silent expert 1 about 0.2 ||O_0||."""
    profile = profile_of(
        full_sq_L=[1.0], raw_full_sq_L=[0.04], output_sq_LE=[[1.0, 0.01, 1.0]], dot_LE=[[1.0, 0, 0]], raw_dot_LE=[[0.2, 0, 0]]
    )
    assert choose("reconstruction", profile, 1, RNG) == [[0]]
    assert choose("raw_reconstruction", profile, 1, RNG) == [[1]]


def test_scale_free_form_ignores_an_experts_scale_and_refuses_its_sign():
    plain = profile_of(full_sq_L=[2.0], output_sq_LE=[[1.0, 1.0, 1.0]], dot_LE=[[0.5, -1.2, 0.8]])
    scaled = profile_of(full_sq_L=[2.0], output_sq_LE=[[9.0, 1.0, 0.0]], dot_LE=[[1.5, -1.2, 0.0]])
    assert scores("scale_free_reconstruction", plain) == pytest.approx([-1.75, -2.0, -1.36])
    assert scores("scale_free_reconstruction", scaled) == pytest.approx([-1.75, -2.0, -2.0])  # tripled; opposed; silent


def test_frequency_and_mass_are_shares_of_the_tokens():
    profile = profile_of(count_LE=[[8, 10, 2]], mass_LE=[[6.0, 3.0, 1.0]])
    assert scores("activation_frequency", profile) == pytest.approx([0.8, 1.0, 0.2])
    assert scores("gate_mass", profile) == pytest.approx([0.6, 0.3, 0.1])


def test_reap_is_the_mean_over_the_tokens_that_an_expert_receives(tiny_base):
    """S_e = 1/|X_e| sum over X_e of w_e ||E_e(x)||, token by token from the real router and experts; 0 for an expert without tokens."""
    base, batch = tiny_base("qwen2_moe", dtype=torch.float64), rows(5, 4)
    profile = measure(base, [batch], 100)
    found = plugins.load("criterion", "reap").score(profile)
    for layer, (site, x) in enumerate(zip(base.sites, brute.layer_inputs(base, batch), strict=True)):
        with torch.no_grad():
            _, weight, index = site.router(x)
        for expert in range(8):
            norm = brute.routed(base, site, x, brute.masked_to([expert])).norm(dim=-1)
            terms = [float(weight[token, place] * norm[token]) for token, place in torch.argwhere(index == expert).tolist()]
            assert float(found[layer, expert]) == pytest.approx(sum(terms) / len(terms) if terms else 0.0, rel=1e-6)
    assert choose("reap", profile, 1, RNG) == found.argmax(-1, keepdim=True).tolist()


def test_reap_keeps_a_rare_strong_expert_that_frequency_drops():
    """Expert 2 receives one token of ten and answers it with norm 9 at weight 0.5."""
    profile = profile_of(count_LE=[[10, 9, 1]], strength_LE=[[6.0, 4.0, 4.5]])
    assert scores("reap", profile) == pytest.approx([0.6, 4 / 9, 4.5])
    assert choose("reap", profile, 1, RNG) == [[2]]
    assert choose("activation_frequency", profile, 1, RNG) == [[0]]


def test_reap_of_pooled_sums_is_that_of_the_pooled_text(tiny_base):
    base, parts = tiny_base("olmoe", dtype=torch.float64), [rows(9, seed=seed) for seed in range(4)]
    profiles = [measure(base, [part], 100) for part in parts]
    pooled = sum(profile.strength_LE for profile in profiles) / sum(profile.count_LE for profile in profiles).clamp_min(1)
    together = plugins.load("criterion", "reap").score(measure(base, parts, 100))
    torch.testing.assert_close(pooled, together, rtol=1e-9, atol=0)


def test_shares_of_a_mixture():
    """By score where a criterion counts something, by inverse error where it measures one, equal where it draws."""
    profile = profile_of(
        full_sq_L=[4.0], output_sq_LE=[[1.0, 1.0, 1.0]], dot_LE=[[2.0, 1.5, 0.5]], mass_LE=[[6.0, 3.0, 1.0]], count_LE=[[8, 10, 2]]
    )
    assert shares("gate_mass", profile, [[0, 2]])[0] == pytest.approx([6 / 7, 1 / 7])
    assert shares("activation_frequency", profile, [[1, 0]])[0] == pytest.approx([10 / 18, 8 / 18])
    assert shares("reconstruction", profile, [[0, 1, 2]])[0] == pytest.approx([1 / 1 / (1 + 1 / 2 + 1 / 4), 0.5 / 1.75, 0.25 / 1.75])
    assert shares("random", profile, [[2, 1]])[0] == [0.5, 0.5]


def test_random_follows_its_stream_and_reaches_every_expert():
    profile = profile_of()
    draws = [choose("random", profile, 2, np.random.default_rng(seed))[0] for seed in range(60)]
    assert draws == [choose("random", profile, 2, np.random.default_rng(seed))[0] for seed in range(60)]
    assert {tuple(sorted(draw)) for draw in draws} == {(0, 1), (0, 2), (1, 2)}


@pytest.mark.parametrize("name", plugins.names("criterion"))
def test_contract_of_every_criterion(tiny_base, name):
    """One of score and select, a one-line summary, and r different experts of every layer."""
    module = plugins.load("criterion", name)
    assert hasattr(module, "score") != hasattr(module, "select")
    assert (module.__doc__ or "").splitlines()[0].endswith(".")
    profile = measure(tiny_base("qwen2_moe"), [rows(12)], 12, gram=True)
    for r in (1, 3, 8):
        chosen = choose(name, profile, r, np.random.default_rng(0))
        assert [len(set(experts)) for experts in chosen] == [r, r]
        assert all(type(expert) is int and 0 <= expert < 8 for experts in chosen for expert in experts)
    if hasattr(module, "score"):
        assert module.score(profile).shape == (2, 8)
    parts = shares(name, profile, choose(name, profile, 3, np.random.default_rng(0)))
    assert [sum(layer) for layer in parts] == pytest.approx([1.0, 1.0])
    assert all(share > 0 for layer in parts for share in layer)
