"""What is swapped in for 16 bits on a CPU computes what it stands for, and nothing else is touched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fedgraft.moe import sixteen_bit

T, H, E, K = 21, 32, 8, 2


def call(seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(E - 2, generator=rng)[:K] for _ in range(T)])  # two experts see nobody
    return torch.randn(T, H, generator=rng).to(dtype), index, torch.rand(T, K, generator=rng).to(dtype)


def test_filling_up_makes_every_group_a_multiple_and_weighs_nothing():
    x, index, weight = call()
    rows, chosen, share = sixteen_bit.filled_up(x, index, weight, E)
    counts = torch.bincount(chosen.flatten(), minlength=E)
    assert counts.tolist() == [-(-count // 16) * 16 for count in torch.bincount(index.flatten(), minlength=E).tolist()]
    assert torch.equal(rows[: T * K], x.repeat_interleave(K, 0))
    assert not rows[T * K :].any()
    assert not share[T * K :].any()
    assert torch.equal(share[: T * K].view(T, K), weight)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss"])
def test_experts_on_rows_filled_up_are_the_experts(tiny_base, family):
    """With their gradients; bf16 has 8 bits."""
    experts = tiny_base(family, dtype=torch.bfloat16).sites[0].experts
    results = []
    for run in (grouped_mm_experts_forward, sixteen_bit.experts):
        x, index, weight = call(dtype=torch.bfloat16)
        x.requires_grad_()
        output = run(experts, x, index, weight)
        output.float().square().sum().backward()
        results.append((output.detach(), x.grad))
    for own, plain in zip(*results, strict=True):
        assert plain.abs().mean() > 1e-4
        torch.testing.assert_close(own, plain, rtol=2e-2, atol=2e-2 * float(plain.abs().max()))


def test_attention_in_bf16_is_that_of_fp32_rounded():
    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 9, 8, generator=rng).bfloat16() for _ in range(3))
    mask = torch.zeros(2, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -1e9)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1)
    exact, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask)
    for outside in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            own, _ = sixteen_bit.attention(module, query, key, value, mask.bfloat16())
        assert torch.equal(own, exact.bfloat16())


def test_fp32_goes_the_old_way_bit_for_bit(tiny_base):
    experts = tiny_base("qwen2_moe").sites[0].experts
    assert torch.equal(sixteen_bit.experts(experts, *call()), grouped_mm_experts_forward(experts, *call()))


def test_transformers_has_its_own_functions_back_whatever_happens():
    before = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    block = sixteen_bit.faster_on_cpu()
    block.__enter__()
    assert (ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_EXPERTS_FUNCTIONS["grouped_mm"]) == (sixteen_bit.attention, sixteen_bit.experts)
    assert not block.__exit__(KeyError, KeyError(), None)
    assert (ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_EXPERTS_FUNCTIONS["grouped_mm"]) == before
