"""What gates, grafts and routers do, against one row at a time with hooks of its own."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch

from fedgraft import seeds
from fedgraft.data.batches import encode
from fedgraft.evaluation import experts
from fedgraft.evaluation.experts import expert_figures
from fedgraft.evaluation.response import response_figures
from fedgraft.grafts.graft import GraftedModel
from fedgraft.grafts.lora import LoraSettings
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.methods.method import Prediction

BASE = Prediction(tree={}, experts=[])


def seen(client, model, rows):
    """Layer -> inputs [T, H], choices [T, k], weights [T, k] and outputs [T, H] of the experts modules over all rows."""
    base, found = client.model.base, defaultdict(list)

    def hook(layer):
        return lambda module, args, output: found[layer].append((*args, output))

    handles = [site.experts.register_forward_hook(hook(site.layer), prepend=True) for site in base.sites]
    for example in rows:
        row, _ = encode(example, base.tokenizer, client.data_settings.template, client.data_settings.max_length)
        with torch.no_grad(), client.model.using(model.tree, model.experts):
            base.model(torch.tensor([row.ids]))
    for handle in handles:
        handle.remove()
    return {layer: [torch.cat(parts) for parts in zip(*calls, strict=True)] for layer, calls in found.items()}


def test_figures_are_those_of_single_rows(client, prediction):
    rows = client.data.test
    found = expert_figures(client, prediction, rows)
    before, after = seen(client, BASE, rows), seen(client, prediction, rows)
    assert found["layers"] == found["graft_layers"] == sorted(before) == [0, 1]
    for at, layer in enumerate(found["layers"]):
        (x, index, _, _), (other, chosen, weights, routed) = before[layer], after[layer]
        tokens = len(x)
        assert found["tokens"] == tokens
        for side, choices in (("base", index), ("personal", chosen)):
            share = [float((choices == expert).sum()) / choices.numel() for expert in range(8)]
            assert found["utilisation"][side][at] == pytest.approx(share, abs=1e-6)
            entropy = -sum(part * math.log(part) for part in share if part)
            assert found["balance"][side][at] == pytest.approx(entropy / math.log(8), abs=1e-5)
        parts = weights.double() / weights.double().sum(-1, keepdim=True)
        assert found["token_entropy"]["personal"][at] == pytest.approx(float(-(parts * parts.log()).sum(-1).mean()) / math.log(2), abs=1e-5)
        same = sum(len(set(mine.tolist()) & set(theirs.tolist())) for mine, theirs in zip(index, chosen, strict=True))
        assert found["agreement"][at] == pytest.approx(same / index.numel(), abs=1e-6)
        cosine = (x.double() * other.double()).sum(-1) / (x.double().norm(dim=-1) * other.double().norm(dim=-1))
        assert found["drift"][at] == pytest.approx(1 - float(cosine.mean()), abs=1e-5)
        gate, added = graft_of(client, prediction, at, layer, other)
        assert found["gate_mean"][at] == [pytest.approx(float(gate.mean()), abs=1e-5)]
        bins = torch.histc(gate, bins=10, min=0, max=1) / tokens
        assert found["gate_histogram"][at][0] == pytest.approx(bins.tolist(), abs=1e-6)
        share = float((added.norm(dim=-1) > routed.norm(dim=-1)).sum()) / tokens
        assert found["dominates"][at] == pytest.approx(share, abs=1.5 / tokens)  # a token may sit on the border
    assert 0 < found["dominates"][0] < 1
    assert found["agreement"][1] < 1
    means = response_figures(client, prediction, rows, 4)["gate_mean"]
    assert found["gate_mean"] == [[pytest.approx(mean, abs=1e-5) for mean in layer] for layer in means]


def graft_of(client, prediction, at, layer, x):
    """(gate [T], sigma(g.x) E(x) [T, H]) of the graft of a layer, by its definition."""
    base, tree = client.model.base, prediction.tree
    source = base.family.expert(base.sites[at], prediction.experts[at][0]).projections()
    scale = client.model.lora_settings.alpha / client.model.lora_settings.rank
    weight = {}
    for name, frozen in source.items():
        head = f"layers.{layer}.side.0.expert.{name}"
        weight[name] = frozen + scale * tree[f"{head}.B"] @ tree[f"{head}.A"]
    gate = torch.sigmoid(x @ tree[f"layers.{layer}.side.0.mix.weight"])
    hidden = torch.nn.functional.silu(x @ weight["gate"].T) * (x @ weight["up"].T)
    return gate.detach(), (gate[:, None] * (hidden @ weight["down"].T)).detach()


def test_without_leaves_nothing_has_moved_and_there_is_no_graft(client):
    found = expert_figures(client, BASE, client.data.test)
    assert found["drift"] == pytest.approx([0, 0], abs=1e-6)
    assert found["agreement"] == [1, 1]
    assert found["utilisation"]["base"] == found["utilisation"]["personal"]
    assert not {"gate_mean", "gate_histogram", "dominates", "graft_layers"} & found.keys()


def test_padding_and_batches_do_not_matter_and_rows_are_bounded(client, prediction, monkeypatch):
    rows = client.data.test
    whole = expert_figures(client, prediction, rows)
    monkeypatch.setattr(experts, "BATCH", 1)
    alone = expert_figures(client, prediction, rows)
    for figure in ("agreement", "drift", "dominates"):
        assert alone[figure] == pytest.approx(whole[figure], abs=1e-3)
    monkeypatch.setattr(experts, "ROWS", 2)
    assert expert_figures(client, prediction, rows) == expert_figures(client, prediction, rows[:2])


def test_a_gate_that_is_off_is_1_and_one_of_a_router_may_be_above(client, tiny_base):
    for settings in (GraftSettings(gate="off"), GraftSettings(form="in_place")):
        model = GraftedModel(tiny_base("qwen2_moe"), LoraSettings(rank=2), settings)
        with seeds.torch_default(1):
            tree = {key: leaf + 0.2 * torch.randn_like(leaf) for key, leaf in model.fresh_side([[3], [5]], 0).items()}
        client.model = model
        found = expert_figures(client, Prediction(tree=tree, experts=[[3], [5]]), client.data.test)
        assert all(sum(bins) == pytest.approx(1, abs=1e-5) for layer in found["gate_histogram"] for bins in layer)
        if settings.gate == "off":
            assert found["gate_mean"] == [[1], [1]]
