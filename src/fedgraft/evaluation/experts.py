"""What gates, grafts and routers do on a client's rows: its personal model beside the untouched base, in one streaming pass.

Routers are frozen, yet they see other inputs once adapters and grafts below them act; how far inputs and choices move is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgraft.data.batches import Batch, batches_in_order, encode_all
from fedgraft.data.example import Example
from fedgraft.evaluation.gates import Gates
from fedgraft.evaluation.response import predicting
from fedgraft.methods.method import Prediction
from fedgraft.moe.load import Base
from fedgraft.moe.routing import normalised, watching
from fedgraft.moe.site import Routed, Site
from fedgraft.training.client import Client
from fedgraft.training.fit import autocast

ROWS = 64
"""At most so many rows are looked at, the first ones."""
BATCH = 4
"""Rows per forward; the inputs of all layers are held meanwhile."""
DIGITS = 6
SIDES = ("base", "personal")


@torch.no_grad()
def expert_figures(client: Client, model: Prediction, examples: Sequence[Example]) -> dict[str, Any]:
    """Figures over all tokens of the first rows, prompts included, padding not.

    Returns:
        `layers` (MoE layers by decoder layer, the order of every [L] below), `tokens`, and of the router, for `base` and `personal` each:
        `utilisation` [L][E], the share of the choices that fall on an expert; `balance` [L], its entropy over log E, 1 when all are chosen
        equally often; `token_entropy` [L], mean entropy of a token's top-k weights over log k, 0 for k = 1. Between the two: `agreement`
        [L], the share of a token's experts that are the same in both, and `drift` [L], 1 - cosine of the experts' inputs, a mean over
        tokens. For a model with grafts also `graft_layers`, and in their order `gate_mean` [L][r], `gate_histogram` [L][r][10] (shares of
        tokens by tenths of the gate) and `dominates` [L], the share of tokens whose grafts' output has a greater norm than the routed one.
    """
    base, gates = client.model.base, Gates()
    meter = _Meter(base)
    rows, _ = encode_all(list(examples[:ROWS]), base.tokenizer, client.data_settings)
    for chosen, cpu_batch in batches_in_order(rows, BATCH, base.pad_id):
        batch = cpu_batch.to(base.device)
        meter.expect(batch.mask != 0)
        gates.expect(batch.mask != 0)
        with watching(base.sites, meter.see_base), autocast(client.training.precision, base.device):
            _forward(base, batch)
        with ExitStack() as inside:
            inside.enter_context(predicting(client, model, [rows[index].ids[: rows[index].start] for index in chosen]))
            inside.enter_context(client.model.watching_gates(gates.see))
            inside.enter_context(watching(base.sites, meter.see_personal))
            inside.enter_context(watching(base.sites, meter.see_grafted, grafted=True))
            inside.enter_context(autocast(client.training.precision, base.device))
            _forward(base, batch)
    layers = gates.layers()
    grafts = {
        "graft_layers": layers,
        "gate_mean": gates.means(),
        "gate_histogram": gates.histograms(),
        "dominates": meter.dominates(layers),
    }
    figures: dict[str, Any] = _rounded(meter.figures() | (grafts if layers else {}))
    return figures


def _forward(base: Base, batch: Batch) -> None:
    base.model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)


class _Meter:
    """The running sums of one pass, by MoE layer."""

    def __init__(self, base: Base) -> None:
        self.sites = base.sites
        self.real, self.tokens = torch.zeros(0, dtype=torch.bool), 0
        self.inputs: dict[int, Tensor] = {}
        self.choices: dict[int, Tensor] = {}
        self.routed: dict[int, Tensor] = {}
        self.used = {side: {site.layer: torch.zeros(site.num_experts) for site in base.sites} for side in SIDES}
        self.sums = {name: dict.fromkeys([site.layer for site in base.sites], 0.0) for name in (*SIDES, "agreement", "drift", "dominates")}

    def expect(self, real: Tensor) -> None:
        """The next two forwards see these tokens, [B, T] bool."""
        self.real, self.tokens = real.flatten(), self.tokens + int(real.sum())

    def see_base(self, site: Site, routed: Routed) -> None:
        """A layer of the untouched base."""
        self.inputs[site.layer], self.choices[site.layer] = routed.x[self.real], routed.index[self.real]
        self._route("base", site, routed)

    def see_personal(self, site: Site, routed: Routed) -> None:
        """The same layer of the personal model, before its grafts."""
        x, index = routed.x[self.real], routed.index[self.real]
        same = (self.choices.pop(site.layer)[:, :, None] == index[:, None, :]).any(-1).double().mean(-1)
        self.sums["agreement"][site.layer] += float(same.sum())
        cosine = F.cosine_similarity(self.inputs.pop(site.layer).float(), x.float(), dim=-1)
        self.sums["drift"][site.layer] += float((1 - cosine.double()).sum())
        self.routed[site.layer] = routed.y[self.real].float()
        self._route("personal", site, routed)

    def see_grafted(self, site: Site, routed: Routed) -> None:
        """The same call with what its grafts have added."""
        before = self.routed.pop(site.layer)
        added = routed.y[self.real].float() - before
        self.sums["dominates"][site.layer] += int((added.norm(dim=-1) > before.norm(dim=-1)).sum())

    def _route(self, side: str, site: Site, routed: Routed) -> None:
        index, weight = routed.index[self.real].cpu(), normalised(routed.weight[self.real]).cpu()
        own = index[index < site.num_experts]  # behind them stand zero-computation experts
        self.used[side][site.layer] += torch.bincount(own, minlength=site.num_experts)
        self.sums[side][site.layer] += float(torch.special.entr(weight).sum()) / math.log(max(2, site.top_k))

    def dominates(self, layers: Sequence[int]) -> list[float]:
        """[L] of these layers."""
        return [self.sums["dominates"][layer] / max(1, self.tokens) for layer in layers]

    def figures(self) -> dict[str, Any]:
        """What needs no graft."""

        def mean(name: str) -> list[float]:
            return [self.sums[name][site.layer] / max(1, self.tokens) for site in self.sites]

        shares = {
            side: [self.used[side][site.layer] / self.used[side][site.layer].sum().clamp(min=1) for site in self.sites] for side in SIDES
        }
        return {
            "layers": [site.layer for site in self.sites],
            "tokens": self.tokens,
            "utilisation": {side: [share.tolist() for share in layers] for side, layers in shares.items()},
            "balance": {
                side: [float(torch.special.entr(share).sum()) / math.log(max(2, len(share))) for share in layers]
                for side, layers in shares.items()
            },
            "token_entropy": {side: mean(side) for side in SIDES},
            "agreement": mean("agreement"),
            "drift": mean("drift"),
        }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return round(value, DIGITS) if isinstance(value, float) else value
