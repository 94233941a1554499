"""Where an MoE architecture keeps its blocks, routers and experts.

The general rule covers every family whose experts module follows transformers' experts contract (`use_experts_implementation`): fused
parameters `gate_up_proj` [E, 2I, H] (or `up_proj` [E, I, H]) and `down_proj` [E, H, I], perhaps transposed, with biases or interleaved, and
`forward(x [T, H], top_k_index [T, k], top_k_weights [T, k]) -> [T, H]`. A family that differs is one file in `moe/families/` that exports
`FAMILY`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedgraft import plugins
from fedgraft.moe.weights import part

PROVEN = ("mixtral", "olmoe", "qwen2_moe")
"""model_types whose extraction, gating and selection the test suite proves exact under the general rule."""

ATTENTION_ROLES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One pretrained expert as views into the fused parameters (no copy). H = hidden size, I = expert width."""

    fused: Tensor
    """[2I, H], gate and up rows in the family's own order; [I, H] when there is no gate projection."""
    fused_bias: Tensor | None
    down: Tensor
    """[H, I]"""
    down_bias: Tensor | None
    split: Callable[[Tensor], tuple[Tensor | None, Tensor]]
    """[..., 2I] -> (gate [..., I] or None, up [..., I]), on the last axis; views."""
    activate: Callable[[Tensor | None, Tensor], Tensor]
    """(gate, up) -> hidden [..., I]."""

    def __call__(self, x: Tensor) -> Tensor:
        """Output [T, H] for x [T, H]."""
        hidden = self.activate(*self.split(F.linear(x, self.fused, self.fused_bias)))
        return F.linear(hidden, self.down, self.down_bias)

    def projections(self) -> dict[str, Tensor]:
        """The frozen weights by projection: gate [I, H] (if any), up [I, H], down [H, I]."""
        gate, up = self.split(self.fused.mT)
        return ({} if gate is None else {"gate": gate.mT}) | {"up": up.mT, "down": self.down}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One MoE layer of a loaded model."""

    layer: int
    path: str
    """Module path of the experts module, before any adapter is injected."""
    experts: Any
    """The experts module (an `nn.Module`)."""
    router: Any
    """The router module beside it, with its rows in `weight` [E, H]."""
    shared: nn.Module | None
    attention: dict[str, str] = field(default_factory=dict)
    """Role (q, k, v, o) -> module path of the attention projection of the same decoder layer."""

    @property
    def num_experts(self) -> int:
        """Routed experts of the layer."""
        return int(self.experts.down_proj.shape[0])


def general_sites(model: nn.Module) -> list[Site]:
    """MoE layers by the experts contract, in order.

    Raises:
        ValueError: there is none, or one has no router beside it, or one normalises each expert's output.
    """
    sites = []
    for path, module in model.named_modules():
        if not _follows_contract(module):
            continue
        block_path = path.rpartition(".")[0]
        block = model.get_submodule(block_path)
        number = re.search(r"layers\.(\d+)\.", path)
        router = next((child for name, child in block.named_children() if child is not module and _routes(child, module)), None)
        if router is None or number is None:
            raise ValueError(f"{path}: found experts but no router beside them; this architecture needs a file in moe/families/")
        if getattr(module, "has_post_expert_norm", False):
            raise ValueError(f"{path}: experts with a norm on their output; this architecture needs a file in moe/families/")
        decoder_path = path[: number.end() - 1]
        attention = {
            ATTENTION_ROLES[name]: f"{decoder_path}.{inner}"
            for inner, part in model.get_submodule(decoder_path).named_modules()
            if (name := inner.rpartition(".")[2]) in ATTENTION_ROLES and isinstance(part, nn.Linear)
        }
        shared = next((part for name, part in block.named_children() if name.startswith("shared_expert") and list(part.children())), None)
        sites.append(Site(layer=int(number.group(1)), path=path, experts=module, router=router, shared=shared, attention=attention))
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no MoE layers: found no module with fused 3-D gate_up_proj (or up_proj) and down_proj"
        )
    return sites


def contract_expert(site: Site, index: int) -> Expert:
    """Expert `index` of a layer that follows the experts contract."""
    module = site.experts
    first = "gate_up_proj" if module.has_gate else "up_proj"
    fused, down = part(module, first, index), part(module, "down_proj", index)
    return Expert(
        fused=fused.mT if module.is_transposed else fused,
        fused_bias=part(module, f"{first}_bias", index) if module.has_bias else None,
        down=down.mT if module.is_transposed else down,
        down_bias=part(module, "down_proj_bias", index) if module.has_bias else None,
        split=_splitter(bool(module.has_gate), bool(module.is_concatenated)),
        activate=_activation(module),
    )


def weight_row(site: Site, index: int) -> Tensor:
    """Router row [H] of expert `index`: a row of the router's weight matrix."""
    row: Tensor = site.router.weight[index].detach()
    return row


def softmax_scores(site: Site, x: Tensor) -> Tensor:
    """Router probabilities [T, E] before top-k for x [T, H]: softmax of the router's logits (with its bias, if any), in fp32."""
    bias = getattr(site.router, "bias", None)
    return F.linear(x.float(), site.router.weight.float(), None if bias is None else bias.float()).softmax(-1)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one architecture is read; the defaults are the general rule."""

    sites: Callable[[nn.Module], list[Site]] = general_sites
    expert: Callable[[Site, int], Expert] = contract_expert
    router_row: Callable[[Site, int], Tensor] = weight_row
    scores: Callable[[Site, Tensor], Tensor] = softmax_scores


def family_of(model_type: str) -> Family:
    """The family of a transformers `model_type`: its own file where there is one, else the general rule."""
    if model_type in plugins.names("family"):
        family = plugins.load("family", model_type).FAMILY
        assert isinstance(family, Family)
        return family
    return Family()


def _follows_contract(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    return isinstance(down, Tensor) and down.ndim == 3 and hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def _routes(candidate: nn.Module, experts: Any) -> bool:
    weight = getattr(candidate, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == len(experts.down_proj) > 1


def _splitter(has_gate: bool, concatenated: bool) -> Callable[[Tensor], tuple[Tensor | None, Tensor]]:
    def halves(fused: Tensor) -> tuple[Tensor | None, Tensor]:
        gate, up = fused.chunk(2, dim=-1)
        return gate, up

    def interleaved(fused: Tensor) -> tuple[Tensor | None, Tensor]:
        return fused[..., ::2], fused[..., 1::2]

    def ungated(fused: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, fused

    if not has_gate:
        return ungated
    return halves if concatenated else interleaved


def _activation(module: Any) -> Callable[[Tensor | None, Tensor], Tensor]:
    """The module's own gating; the default one without first fusing gate and up again."""
    own = getattr(type(module)._apply_gate, "__name__", "") != "_default_apply_gate"

    def default(gate: Tensor | None, up: Tensor) -> Tensor:
        result: Tensor = module.act_fn(up) if gate is None else module.act_fn(gate) * up
        return result

    def custom(gate: Tensor | None, up: Tensor) -> Tensor:
        assert gate is not None
        fused = torch.cat([gate, up], -1) if module.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
        result: Tensor = module._apply_gate(fused)
        return result

    return custom if own and module.has_gate else default
