"""Who reads a layer runs its experts where that is exact; elsewhere they run by themselves and are looked on."""

from __future__ import annotations

import pytest
import torch

from fedgraft.moe.reading import reading


def nothing(site, x, index, weight):
    return torch.zeros_like(x)


@pytest.fixture
def own_calls(monkeypatch):
    """`own_calls(base)`: filled with the layer whenever its experts run by themselves."""

    def count(base):
        calls, kind = [], type(base.sites[0].experts)
        number, forward = {id(site.experts): site.layer for site in base.sites}, kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, *args: calls.append(number[id(self)]) or forward(self, *args))
        return calls

    return count


@pytest.mark.parametrize(("dtype", "calls"), [(torch.float32, []), (torch.float64, []), (torch.bfloat16, [0, 1])])
def test_experts_run_by_themselves_in_16_bits_alone(tiny_base, own_calls, dtype, calls):
    base, ids = tiny_base("qwen2_moe", dtype=dtype), torch.randint(3, 259, (1, 6))
    with torch.no_grad():
        plain = base.model(ids).logits
        found = own_calls(base)
        with reading(base, nothing):
            read = base.model(ids).logits
    assert found == calls
    assert torch.equal(read, plain) == bool(calls)  # what is returned goes on only where the experts do not run


def test_a_forward_that_is_not_the_classs_is_left_alone(tiny_base):
    """As under accelerate's offload, or on experts with adapters of their own."""
    base, ids = tiny_base("mixtral"), torch.randint(3, 259, (1, 6))
    other = base.sites[0].experts
    forward, calls = other.forward, []
    other.forward = lambda *args: calls.append(args) or forward(*args)
    seen = []
    with torch.no_grad(), reading(base, lambda site, *routed: seen.append(site.layer) or nothing(site, *routed)):
        base.model(ids)
    assert (len(calls), seen) == (1, [0, 1])
    assert "forward" in vars(other)
    assert "forward" not in vars(base.sites[1].experts)
