"""Floating point operations of one forward, per token: two for every matrix entry that the token meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fedgraft.account.layers import Layer
from fedgraft.grafts.lora import Shapes
from fedgraft.grafts.side_expert import GraftSettings
from fedgraft.moe.family import Anatomy


@dataclass(frozen=True, kw_only=True)
class Compute:
    """FLOPs per token of one forward, by part. Norms, activations, rotations and state-space scans are left out."""

    routed: int
    """The k chosen experts of every MoE layer."""
    shared: int
    """Shared experts."""
    other: int
    """All other matrices in the layers: attention, state-space, dense feed-forward, routers."""
    scores: int
    """Attention scores and mixtures, 4 T d a layer at length T, without the causal half: kernels differ in whether they save it."""
    head: int
    """The output layer; in training it sees the positions before response tokens alone."""
    adapters: int
    """LoRA pairs."""
    graft: int
    """Grafted experts, their pairs and gates."""
    selection: int
    """Every expert of every MoE layer, which selection runs on top of a forward."""
    experts_per_graft: tuple[float, float]
    """What the graft's frozen matrices add to the routed experts, and to routed and shared experts, as shares."""

    @property
    def base(self) -> int:
        """The model without a graft or adapters."""
        return self.routed + self.shared + self.other + self.scores + self.head

    @property
    def grafted(self) -> int:
        """The model with them."""
        return self.base + self.adapters + self.graft


def compute_of(anatomy: Anatomy, layers: Sequence[Layer], adapters: Shapes, side: Shapes, graft: GraftSettings, length: int) -> Compute:
    """Count a forward at `length` tokens a row; `layers` each alone, `adapters` and `side` the leaves in use ({}: none)."""
    experts = [layer.experts for layer in layers if layer.experts is not None]
    head = anatomy.model.get_output_embeddings()
    inside = {id(part) for site in anatomy.sites for part in site.experts.parameters()}
    counted = {id(part) for site in anatomy.sites for module in site.shared for part in module.parameters()} | inside
    routed, shared = sum(each.top_k * each.parameters for each in experts), sum(each.shared for each in experts)
    grafts = len({tuple(key.split(".")[:4]) for key in side}) // max(1, len(experts))
    frozen = grafts * sum(each.parameters for each in experts)
    in_place = graft.form == "in_place"  # it runs on the tokens that are routed to its source alone
    met = sum(each.parameters * each.top_k / each.number for each in experts) / sum(each.parameters for each in experts) if in_place else 1
    return Compute(
        routed=2 * routed,
        shared=2 * shared,
        other=2 * _other(anatomy.model, head, counted),
        scores=sum(_scores(layer, length) for layer in layers),
        head=2 * head.weight.numel(),
        adapters=2 * _active(adapters, layers),
        graft=round(2 * met * (frozen * (1 + (graft.form != "faithful")) + _extra(side, graft))),
        selection=2 * sum(each.number * each.parameters for each in experts),
        experts_per_graft=(met * frozen / routed, met * frozen / (routed + shared)),
    )


def _other(model: nn.Module, head: nn.Module, counted: set[int]) -> int:
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Embedding) or module is head:
            continue
        total += sum(part.numel() for part in module._parameters.values() if part is not None and part.ndim > 1 and id(part) not in counted)
    return total


def _scores(layer: Layer, length: int) -> int:
    """Products of queries with keys, and of weights with values; d = heads x head size, read from the output projection."""
    quadratic = [] if "linear" in layer.kind else layer.at("attention")
    width = max((linear.inputs for linear in quadratic if "o" in linear.roles), default=0)
    return 4 * min(length, layer.window or length) * width


def _active(adapters: Shapes, layers: Sequence[Layer]) -> int:
    """Entries of the adapters that one token meets: of the pairs on routed experts k in E; router rows stand in for pretrained ones."""
    share = {layer.numbers[0]: layer.experts.top_k / layer.experts.number for layer in layers if layer.experts is not None}
    total = 0.0
    for address, shape in adapters.items():
        _, number, place, _ = address.split(".", 3)
        total += _entries(shape) * {"expert": share.get(int(number), 1.0), "router": 0.0}.get(place, 1.0)
    return round(total)


def _extra(side: Shapes, graft: GraftSettings) -> int:
    """Entries of a graft's leaves beyond its expert's own matrices: the gates, and pairs where those are trained."""
    return sum(_entries(shape) for shape in side.values() if graft.train == "lora" or len(shape) == 1)


def _entries(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total
