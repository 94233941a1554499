"""What passes through the experts modules, seen by a hook."""

from __future__ import annotations

import pytest
import torch

from fedgraft.moe.load import probe
from fedgraft.moe.routing import normalised, watching
from fedgraft.moe.site import Routed, contract_inputs, contract_routing
from tests.conftest import PROVEN


def seen_in(base, ids, sites=None) -> list[tuple[int, Routed]]:
    seen = []
    with torch.no_grad(), watching(base.sites if sites is None else sites, lambda site, routed: seen.append((site.layer, routed))):
        base.model(ids)
    return seen


@pytest.mark.parametrize("family", PROVEN)
def test_sees_every_layer_once_with_what_it_computed(tiny_base, family):
    base = tiny_base(family)
    seen = seen_in(base, torch.randint(3, 259, (2, 5)))
    assert [layer for layer, _ in seen] == [0, 1]
    for site, (_, routed) in zip(base.sites, seen, strict=True):
        assert routed.x.shape == routed.y.shape == (10, 32)
        assert routed.index.shape == routed.weight.shape == (10, 2)
        outputs = torch.stack([base.family.expert(site, index)(routed.x) for index in range(8)], 1)  # [T, E, H]
        rebuilt = (routed.weight[..., None] * outputs.gather(1, routed.index[..., None].expand(-1, -1, 32))).sum(1)
        torch.testing.assert_close(rebuilt, routed.y, rtol=1e-5, atol=1e-5)


def test_changes_no_logit_and_stops_watching(tiny_base):
    base, ids = tiny_base("qwen2_moe"), torch.randint(3, 259, (1, 6))
    with torch.no_grad():
        before = base.model(ids).logits
        with watching(base.sites, lambda site, routed: None):
            during = base.model(ids).logits
    assert torch.equal(before, during)
    seen = []
    with pytest.raises(RuntimeError), watching(base.sites, lambda site, routed: seen.append(site)):
        raise RuntimeError
    with torch.no_grad():
        base.model(ids)
    assert not seen


def test_sees_the_output_before_hooks_of_others(tiny_base):
    """A graft hooked first must not change what is seen."""
    base, ids = tiny_base("mixtral"), torch.randint(3, 259, (1, 6))
    plain = seen_in(base, ids, base.sites[:1])[0][1].y
    handle = base.sites[0].experts.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(seen_in(base, ids, base.sites[:1])[0][1].y, plain)
    handle.remove()


def test_arguments_by_position_and_by_name():
    x, index, weight = torch.randn(2, 3, 4), torch.zeros(6, 2, dtype=torch.long), torch.rand(6, 2)
    for args, kwargs in [((x, index, weight), {}), ((x,), {"top_k_weights": weight, "top_k_index": index})]:
        call = (args, kwargs)
        flat, (got_index, got_weight) = contract_inputs(call), contract_routing(None, call)
        assert torch.equal(flat, x.reshape(6, 4))
        assert got_index is index
        assert got_weight is weight


def test_normalised_weights_ignore_a_common_factor():
    weight = torch.tensor([[0.1, 0.3], [0.5, 0.5]])
    torch.testing.assert_close(normalised(weight), torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(normalised(2.5 * weight), normalised(weight), rtol=1e-6, atol=0)


def test_a_bypassed_layer_is_found(tiny_base):
    """A kernel that replaces the whole block never calls the experts module."""
    base = tiny_base("olmoe")
    base.model.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: ran 0 times"):
        probe(base.model, base.sites)
