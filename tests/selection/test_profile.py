"""The streaming sums against brute force, and what must not change them."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from fedgraft.selection.profile import GRAM_BYTES, Profile, measure
from tests.conftest import PROVEN
from tests.selection import brute
from tests.selection.brute import Rows, rows

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def assert_same(left: Profile, right: Profile, **tolerance: float) -> None:
    for field in fields(Profile):
        torch.testing.assert_close(
            getattr(left, field.name), getattr(right, field.name), msg=lambda text, f=field: f"{f.name}: {text}", **tolerance
        )


@pytest.mark.parametrize("family", PROVEN)
@pytest.mark.parametrize("gram", [False, True])
def test_sums_equal_brute_force(tiny_base, family, gram):
    """Every sum from forwards of the real block: R by the router itself (weights made to sum 1, or raw), O_e by the router masked to e."""
    base, batch = tiny_base(family, dtype=torch.float64), rows(9, 14)
    profile = measure(base, [batch], 1000, gram=gram)
    assert profile.tokens == 23
    for layer, (site, x) in enumerate(zip(base.sites, brute.layer_inputs(base, batch), strict=True)):
        full, raw = brute.routed(base, site, x, brute.unit_sum), brute.routed(base, site, x, brute.as_is)
        outputs = torch.stack([brute.routed(base, site, x, brute.masked_to([expert])) for expert in range(8)])  # [E, T, H]
        with torch.no_grad():
            _, weight, index = site.router(x)
        chosen = torch.nn.functional.one_hot(index, 8).double()  # [T, k, E]
        expected = {
            "full_sq_L": full.square().sum(),
            "output_sq_LE": outputs.square().sum((1, 2)),
            "dot_LE": (full * outputs).sum((1, 2)),
            "raw_full_sq_L": raw.square().sum(),
            "raw_dot_LE": (raw * outputs).sum((1, 2)),
            "count_LE": chosen.sum((0, 1)),
            "mass_LE": (chosen * weight.double()[..., None]).sum((0, 1)),
            "strength_LE": torch.einsum("tke,tk,et->e", chosen, weight.double(), outputs.norm(dim=-1)),
            "error_LE": (full - outputs).square().sum((1, 2)),
        }
        for name, value in expected.items():
            torch.testing.assert_close(getattr(profile, name)[layer], value, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
        if gram:
            torch.testing.assert_close(profile.token_dot[layer], (full * outputs).sum(-1).T, **EXACT)
            torch.testing.assert_close(
                profile.token_gram[layer].double(), torch.einsum("ith,jth->tij", outputs, outputs), rtol=1e-6, atol=1e-6
            )
            scores = torch.nn.functional.linear(x, site.router.weight).softmax(-1).float()
            torch.testing.assert_close(profile.token_scores[layer], scores)
    assert (profile.token_gram is None) == (not gram)


def test_raw_and_normalised_differ_only_where_the_family_does_not_normalise(tiny_base):
    """Mixtral's weights sum to 1 already; Qwen2-MoE's are probabilities over all experts."""
    same, other = (measure(tiny_base(family), [rows(20)], 20) for family in ("mixtral", "qwen2_moe"))
    torch.testing.assert_close(same.raw_full_sq_L, same.full_sq_L, rtol=1e-6, atol=0)
    assert (other.raw_full_sq_L < 0.9 * other.full_sq_L).all()


def test_a_factor_on_the_top_k_weights_leaves_the_normalised_sums(tiny_base):
    """A routed scaling factor (DeepSeek) multiplies all weights of a token."""
    base, batch = tiny_base("mixtral", dtype=torch.float64), rows(20)
    plain = measure(base, [batch], 20)
    site = base.sites[1]  # the last layer, so that no later input changes
    site.router.register_forward_hook(lambda module, args, own: (own[0], 2.5 * own[1], own[2]))
    scaled = measure(base, [batch], 20)
    torch.testing.assert_close(scaled.error_LE, plain.error_LE, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.raw_full_sq_L[1], 6.25 * plain.raw_full_sq_L[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", PROVEN)
def test_padding_changes_nothing(tiny_base, family):
    base = tiny_base(family, dtype=torch.float64)
    tight = [rows(12, 12, seed=1)]
    wide = rows(12, 12, 12, seed=1, width=20)
    wide.mask[2] = 0  # a row of padding alone
    left = Rows(tight[0].ids.new_zeros(2, 15), tight[0].mask.new_zeros(2, 15))
    left.ids[:, 3:], left.mask[:, 3:] = tight[0].ids, tight[0].mask
    reference = measure(base, tight, 1000)
    assert_same(measure(base, [wide], 1000), reference, **EXACT)
    assert_same(measure(base, [left], 1000), reference, rtol=1e-5, atol=1e-4)  # rotary angles are fp32, and here they start elsewhere
    assert_same(measure(base, [wide], 1000, gram=True), measure(base, tight, 1000, gram=True), rtol=1e-6, atol=1e-6)


def test_batch_split_changes_nothing(tiny_base):
    base, whole = tiny_base("qwen2_moe", dtype=torch.float64), rows(5, 16, 9, 11)
    reference, with_gram = (measure(base, [whole], 1000, gram=gram) for gram in (False, True))
    for sizes in ([1, 1, 1, 1], [3, 1]):
        parts = [Rows(*part) for part in zip(whole.ids.split(sizes), whole.mask.split(sizes), strict=True)]
        assert_same(measure(base, parts, 1000), reference, **EXACT)
        assert_same(measure(base, parts, 1000, gram=True), with_gram, rtol=1e-6, atol=1e-6)  # kept in fp32


def test_gram_is_the_same_in_chunks(tiny_base, monkeypatch):
    base, batch = tiny_base("olmoe", dtype=torch.float64), rows(7, 16)
    reference = measure(base, [batch], 1000, gram=True)
    monkeypatch.setattr("fedgraft.selection.profile.CHUNK_BYTES", 5 * 8 * 8 * 32)  # 5 tokens at a time
    assert_same(measure(base, [batch], 1000, gram=True), reference, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("family", PROVEN)
def test_outputs_held_or_made_twice_give_the_same(tiny_base, monkeypatch, family):
    base, batch = tiny_base(family, dtype=torch.float64), rows(7, 16)
    reference = measure(base, [batch], 1000)
    monkeypatch.setattr("fedgraft.selection.profile.CHUNK_BYTES", 0)
    assert_same(measure(base, [batch], 1000), reference, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_runs_as_before_afterwards(tiny_base, dtype):
    """The experts that were stood in for are back, after a pass and after one that failed."""
    base, batch = tiny_base("qwen2_moe", dtype=dtype), rows(7, 16)

    def logits():
        with torch.no_grad():
            return base.model(input_ids=batch.ids, attention_mask=batch.mask).logits

    before = logits()
    measure(base, [batch], 1000)
    assert torch.equal(logits(), before)
    base.sites[0].experts.down_proj.data[3] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        measure(base, [batch], 1000)
    assert not any("forward" in vars(site.experts) for site in base.sites)


def test_sums_of_single_precision_are_those_of_double(tiny_base):
    """Sums over H in fp32, over tokens in float64: within the rounding of the outputs themselves."""
    single, double = (measure(tiny_base("olmoe", dtype=dtype), [rows(60, 60)], 1000) for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(single.error_LE, double.error_LE, rtol=3e-6, atol=0)
    torch.testing.assert_close(single.strength_LE, double.strength_LE, rtol=3e-6, atol=0)


def test_budget_is_exact_and_no_batch_is_drawn_beyond_it(tiny_base):
    base, drawn, reports = tiny_base("olmoe", dtype=torch.float64), [], []

    def endless():
        while True:
            drawn.append(rows(8, 3, 6, seed=len(drawn)))
            yield drawn[-1]

    profile = measure(base, endless(), 27, progress=reports.append)
    assert (profile.tokens, len(drawn), reports) == (27, 2, [17, 27])
    assert profile.count_LE.sum(-1).tolist() == [54, 54]  # top-2
    cut = rows(8, 2, seed=1)  # of the second batch: the first row and 2 of 3 tokens; earlier tokens don't see later ones
    assert_same(profile, measure(base, [rows(8, 3, 6), cut], 27), **EXACT)


def test_fewer_tokens_than_the_budget(tiny_base):
    profile = measure(tiny_base("olmoe"), [rows(4)], 100, gram=True)
    assert profile.tokens == 4
    assert profile.token_scores.shape == profile.token_dot.shape == (2, 4, 8)
    assert profile.token_gram.shape == (2, 4, 8, 8)


def test_bfloat16_base_is_summed_in_float64(tiny_base):
    """The sums of a bf16 base equal those of its own bf16 expert outputs taken in float64; bf16 sums would be off by percents."""
    base, batch = tiny_base("olmoe", dtype=torch.bfloat16), rows(40, 40)
    profile = measure(base, [batch], 80)
    for layer, (site, x) in enumerate(zip(base.sites, brute.layer_inputs(base, batch), strict=True)):
        squares = [float(base.family.expert(site, expert)(x).double().square().sum()) for expert in range(8)]
        torch.testing.assert_close(profile.output_sq_LE[layer], torch.tensor(squares, dtype=torch.float64), rtol=1e-4, atol=0)
    assert profile.dot_LE.dtype == torch.float64


def test_too_much_gram_is_refused_with_a_budget_that_fits(tiny_base):
    base = tiny_base("olmoe")
    fits = GRAM_BYTES // (2 * 4 * 8**2)
    with pytest.raises(ValueError, match=f"lower selection.tokens to {fits:,}"):
        measure(base, [], fits + 1, gram=True)
    with pytest.raises(ValueError, match="no real token"):  # past the check
        measure(base, [], fits, gram=False)


@pytest.mark.parametrize("batches", [[], [Rows(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))]])
def test_no_token_is_refused(tiny_base, batches):
    with pytest.raises(ValueError, match="no real token"):
        measure(tiny_base("olmoe"), batches, 10)


def test_budget_below_one_is_refused(tiny_base):
    with pytest.raises(ValueError, match=r"selection\.tokens is 0"):
        measure(tiny_base("olmoe"), [rows(4)], 0)


def test_overflow_is_refused_by_layer(tiny_base):
    base = tiny_base("olmoe")
    base.sites[1].experts.down_proj.data[3] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: expert outputs are not finite"):
        measure(base, [rows(4)], 4)


def test_profile_takes_part_in_ordinary_arithmetic(tiny_base):
    """Nothing of inference mode leaks out."""
    profile = measure(tiny_base("olmoe"), [rows(4)], 4, gram=True)
    for field in fields(Profile):
        value = getattr(profile, field.name)
        if isinstance(value, torch.Tensor):
            assert not value.is_inference()
            value += 1
