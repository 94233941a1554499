"""Leaves as ordinary weights: what a low-rank term adds to a matrix, what a graft is as an expert of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedgraft import address
from fedgraft.grafts.graft import Fitted
from fedgraft.grafts.lora import LoraSettings, Terms
from fedgraft.grafts.side_expert import GraftSettings, Side
from fedgraft.moe.family import Anatomy, router_matrix


@dataclass(frozen=True, kw_only=True)
class Gated:
    """An expert beside the routed ones, sigmoid(g.x + b) E(x), in fp32; I' = width, H = inputs."""

    gate: Tensor | None
    """[I', H]; None for experts without a gate projection."""
    up: Tensor
    """[I', H]"""
    down: Tensor
    """[H, I']"""
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    mix: Tensor | None
    """g [H]; None: the weight is 1."""
    mix_bias: Tensor | None
    """b []"""

    @property
    def biased(self) -> bool:
        """Whether any projection has a bias."""
        return any(bias is not None for bias in (self.gate_bias, self.up_bias, self.down_bias))


def change_of(terms: Terms, alpha: float) -> Tensor:
    """[out, in], float64: what all terms of one linear layer add to its weight."""
    parts = [_share(terms, head) * alpha / len(pair[0]) * (pair[1].double() @ pair[0].double()) for head, pair in terms.pairs.items()]
    if terms.residual:
        product = terms.residual[-1].double()
        for factor in reversed(terms.residual[:-1]):
            product = product @ factor.double()
        parts.append(product)
    return torch.stack(parts).sum(0)


def stacked(terms: Terms, alpha: float) -> tuple[Tensor, Tensor, float] | None:
    """(A [R, in], B [out, R], alpha R): one pair that adds what all terms add, with its scale alpha R / R; None for a dense residual.

    A single pair stays bit for bit what it is; of several the scales are in B, so alpha R is R.
    """
    if len(terms.residual) == 1:
        return None
    if len(terms.pairs) == 1 and not terms.residual and not terms.shares:
        ((factor_a, factor_b),) = terms.pairs.values()
        return factor_a, factor_b, alpha
    scaled = [(pair[0], _share(terms, head) * alpha / len(pair[0]) * pair[1]) for head, pair in terms.pairs.items()]
    scaled += [(terms.residual[0], terms.residual[1])] if terms.residual else []
    factor_a, factor_b = torch.cat([first for first, _ in scaled]), torch.cat([second for _, second in scaled], dim=1)
    return factor_a, factor_b, float(len(factor_a))


def _share(terms: Terms, head: str) -> float:
    return float(terms.shares[head]) if head in terms.shares else 1.0


def merge(anatomy: Anatomy, fitted: Fitted, lora: LoraSettings, graft: GraftSettings) -> None:
    """Write everything but grafts with a place of their own into the base's weights, summed in float64; the base is another one then."""
    for part in anatomy.projections:
        terms = fitted.low_rank.get(address.projection(part.layer, part.place, part.name))
        if terms is not None:
            _add(anatomy.model.get_submodule(part.path).weight, change_of(terms, lora.alpha))
    for site in anatomy.sites:
        if site.layer in fitted.router:
            matrix = router_matrix(site)
            assert matrix is not None
            matrix.data.copy_(fitted.router[site.layer])
        for index, pairs in fitted.experts.get(site.layer, {}).items():
            for name, weight in anatomy.family.expert(site, index).projections().items():  # views
                _add(weight, _pair(pairs.leaves, name, lora.alpha))
        for side in fitted.sides.get(site.layer, ()) if graft.form == "in_place" else ():
            grown = weights_of(side, lora.alpha)
            for name, weight in side.source.projections().items():
                weight.data.copy_(grown[name])


def grafts_of(anatomy: Anatomy, fitted: Fitted, lora: LoraSettings, graft: GraftSettings) -> dict[int, list[Gated]]:
    """Layer -> its grafts as experts of their own; {} in place, where `merge` writes them into their sources."""
    if graft.form == "in_place":
        return {}
    preserving = graft.form == "preserving"
    return {layer: [_gated(side, lora.alpha, preserving) for side in sides] for layer, sides in fitted.sides.items()}


def folded(grafts: Sequence[Gated]) -> Gated | None:
    """Several as one, exactly: they have one gate in common, so their widths stand side by side. None where they have not."""
    first = grafts[0]
    alike = all(_equal(one.mix, first.mix) and _equal(one.mix_bias, first.mix_bias) for one in grafts)
    if not alike or (len(grafts) > 1 and any(one.down_bias is not None for one in grafts)):
        return None
    return replace(
        first,
        gate=_cat([one.gate for one in grafts], 0),
        up=torch.cat([one.up for one in grafts]),
        down=torch.cat([one.down for one in grafts], dim=1),
        gate_bias=_cat([one.gate_bias for one in grafts], 0),
        up_bias=_cat([one.up_bias for one in grafts], 0),
    )


def weights_of(side: Side, alpha: float) -> dict[str, Tensor]:
    """The projections of a graft, fp32."""
    frozen = side.source.projections()
    if "down.weight" in side.leaves:
        return {name: side.leaves[f"{name}.weight"].float() for name in frozen}
    return {name: (weight.double() + _pair(side.leaves, name, alpha)).float() for name, weight in frozen.items()}


def _gated(side: Side, alpha: float, preserving: bool) -> Gated:
    """E_g, or E_g - E_e as one expert of twice the width, in which the biases of `down` cancel."""
    own, source = weights_of(side, alpha), side.source
    grown = Gated(
        gate=own.get("gate"),
        up=own["up"],
        down=own["down"],
        gate_bias=source.gate_bias,
        up_bias=source.up_bias,
        down_bias=None if preserving else source.down_bias,
        mix=None if side.gate is None else side.gate.float().clone(),  # a fixed one is a view into the router's rows
        mix_bias=side.bias,
    )
    if not preserving:
        return grown
    frozen = {name: weight.float() for name, weight in source.projections().items()}
    away = replace(grown, gate=frozen.get("gate"), up=frozen["up"], down=-frozen["down"])
    both = folded([grown, away])
    assert both is not None
    return both


def _pair(leaves: Mapping[str, Tensor], name: str, alpha: float) -> Tensor:
    factor_a, factor_b = leaves[f"{name}.A"].double(), leaves[f"{name}.B"].double()
    return alpha / len(factor_a) * (factor_b @ factor_a)


def _add(weight: Tensor, change: Tensor) -> None:
    weight.data.copy_(weight.double() + change)


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    return left is right if left is None or right is None else torch.equal(left, right)


def _cat(parts: Sequence[Tensor | None], axis: int) -> Tensor | None:
    whole = [part for part in parts if part is not None]
    return torch.cat(whole, dim=axis) if whole else None
