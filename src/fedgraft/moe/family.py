"""Where an MoE architecture keeps its blocks, routers and experts.

The general rule covers every family whose experts module follows transformers' experts contract (`use_experts_implementation`): fused
parameters `gate_up_proj` [E, 2I, H] (or `up_proj` [E, I, H]) and `down_proj` [E, H, I], perhaps transposed, with biases or interleaved, and
`forward(x [T, H], top_k_index [T, k], top_k_weights [T, k]) -> [T, H]`. A family that differs is one file in `moe/families/` that exports
`FAMILY`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedgraft import plugins
from fedgraft.moe.expert import Expert, contract_expert
from fedgraft.moe.projections import Projection, find_projections
from fedgraft.moe.routing import normalised
from fedgraft.moe.site import Site

ROUTER_NAMES = ("gate", "router")
TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
SCORINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}
"""How families turn router logits into scores; top-k weights are in proportion to them."""


def general_sites(model: nn.Module) -> list[Site]:
    """MoE layers by the experts contract, in order.

    Raises:
        ValueError: there is none, or one has no router beside it, or one normalises each expert's output.
    """
    sites = []
    for path, module in model.named_modules():
        if not _follows_contract(module):
            continue
        block = model.get_submodule(path.rpartition(".")[0])
        router = _router_beside(block, module)
        if router is None or layer_number(path) is None:
            raise ValueError(f"{path}: found experts but no router beside them; this architecture needs a file in moe/families/")
        if getattr(module, "has_post_expert_norm", False):
            raise ValueError(f"{path}: experts with a norm on their output; this architecture needs a file in moe/families/")
        sites.append(contract_site(model, path, module, router, block))
    return found_sites(model, sites)


def contract_site(model: Any, path: str, experts: Any, router: nn.Module, block: nn.Module) -> Site:
    """A site whose experts module is called by the contract; sizes are read from its `down_proj`."""
    down = experts.down_proj
    width, inputs = (down.shape[1], down.shape[2]) if getattr(experts, "is_transposed", False) else (down.shape[2], down.shape[1])
    number = layer_number(path)
    assert number is not None
    return Site(
        layer=number,
        path=path,
        experts=experts,
        router=router,
        num_experts=int(down.shape[0]),
        width=int(width),
        inputs_width=int(inputs),
        top_k=top_k_of(model.config),
        block=block,
        hooked=experts,
        shared=shared_experts(block),
    )


def found_sites(model: nn.Module, sites: list[Site]) -> list[Site]:
    """The sites.

    Raises:
        ValueError: there is none.
    """
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no MoE layers: found no module with fused 3-D gate_up_proj (or up_proj) and down_proj"
        )
    return sites


def shared_experts(block: nn.Module) -> list[nn.Module]:
    """The children of a block that are shared experts (not their gate)."""
    return [part for name, part in block.named_children() if name.startswith("shared") and list(part.parameters()) and not _is_gate(name)]


def top_k_of(config: Any) -> int:
    """Experts per token by the configuration.

    Raises:
        ValueError: it names none.
    """
    text = config.get_text_config()
    found = next((getattr(text, name) for name in TOP_K_NAMES if isinstance(getattr(text, name, None), int)), None)
    if found is None:
        raise ValueError(f"{text.model_type}: the configuration names no number of experts per token (looked for {', '.join(TOP_K_NAMES)})")
    return int(found)


def layer_number(path: str) -> int | None:
    """The decoder layer in a module path: its first number."""
    number = re.search(r"\.(\d+)\.", path)
    return int(number.group(1)) if number else None


def list_of_layers(sites: Sequence[Site]) -> str:
    """Module path of the one list of decoder layers that has all these MoE layers.

    Raises:
        ValueError: there are several.
    """
    found = sorted({re.split(r"\.\d+\.", site.path, maxsplit=1)[0] for site in sites})
    if len(found) != 1:
        raise ValueError(f"its MoE layers are in several lists of decoder layers: {', '.join(found)}")
    return found[0]


def weight_row(site: Site, index: int) -> Tensor:
    """Router row [H] of expert `index`: a row of the router's weight matrix.

    Raises:
        ValueError: the router is no linear map of the experts' inputs.
    """
    matrix = router_matrix(site)
    if matrix is None:
        raise ValueError(
            f"{site.path}: its router is no linear map of the experts' inputs, so there is no router row to start a gate from; "
            "set graft.gate_start: low"
        )
    return matrix[index].detach()


def router_matrix(site: Site) -> nn.Parameter | None:
    """The router's weight [E or more, H], rows by expert; None where it is no single linear map of the experts' inputs."""
    matrices = [part for part in site.router.parameters() if part.ndim == 2 and part.shape[0] >= site.num_experts]
    if len(matrices) != 1 or matrices[0].shape[1] != site.inputs_width:
        return None
    matrix: nn.Parameter = matrices[0]
    return matrix


def matching_scores(site: Site, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Router scores [T, E] before top-k for x [T, H], in fp32, up to a factor per token.

    Families score by softmax, sigmoid or else; the one whose scores are in proportion to the top-k weights that the model itself gave,
    `weight` [T, k] of the experts `index`, is taken.

    Raises:
        ValueError: none is, so the router does something else.
    """
    matrix = router_matrix(site)
    if matrix is not None:
        bias = next((part.float() for part in site.router.parameters() if part.ndim == 1 and len(part) == len(matrix)), None)
        given = normalised(weight)
        tolerance = 1e-3 if weight.dtype == torch.float32 else 3e-2
        for logits in (F.linear(x.float(), matrix.float(), own) for own in dict.fromkeys((bias, None))):
            for score in SCORINGS.values():
                scores = score(logits)
                if torch.allclose(normalised(scores.gather(1, index)), given, rtol=tolerance, atol=tolerance):
                    return scores[:, : site.num_experts]
    raise ValueError(
        f"{site.path}: the router's scores over all experts are not known for this architecture, so several can't be chosen jointly; "
        "graft one expert per layer or use another selection.criterion"
    )


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one architecture is read; the defaults are the general rule."""

    sites: Callable[[nn.Module], list[Site]] = general_sites
    expert: Callable[[Site, int], Expert] = lambda site, index: contract_expert(site.experts, index)
    router_row: Callable[[Site, int], Tensor] = weight_row
    scores: Callable[[Site, Tensor, Tensor, Tensor], Tensor] = matching_scores


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What of a model is what; works on the meta device too."""

    model: Any
    """The transformers model."""
    family: Family
    sites: list[Site]
    projections: list[Projection]
    """Every linear layer of the decoder, by role."""


def anatomy_of(model: Any) -> Anatomy:
    """MoE layers and linear projections of a causal language model.

    Raises:
        ValueError: it has no MoE layers, or they are not understood.
    """
    family = family_of(model.config.model_type)
    sites = family.sites(model)
    return Anatomy(model=model, family=family, sites=sites, projections=find_projections(model, sites))


def family_of(model_type: str) -> Family:
    """The family of a transformers `model_type`: its own file where there is one (`x_text` shares that of `x`), else the general rule."""
    for name in (model_type, model_type.removesuffix("_text")):
        if name in plugins.names("family"):
            family = plugins.load("family", name).FAMILY
            assert isinstance(family, Family)
            return family
    return Family()


def blocks(model: nn.Module, experts: str) -> Iterator[tuple[str, Any]]:
    """(path, block) of every module with children called `router` and `experts`, for families outside the contract."""
    for path, module in model.named_modules():
        children = dict(module.named_children())
        if "router" in children and experts in children and layer_number(f"{path}.") is not None:
            yield path, module


def _follows_contract(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    return isinstance(down, Tensor) and down.ndim == 3 and hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def _router_beside(block: nn.Module, experts: nn.Module) -> nn.Module | None:
    """A sibling called gate or router that holds at least a row per expert, else one whose weight has a row per expert."""
    count = len(getattr(experts, "down_proj"))  # noqa: B009  # a Tensor at run time, unknown to the type checker
    siblings = [(name, child) for name, child in block.named_children() if child is not experts]
    for name, child in siblings:
        if name in ROUTER_NAMES and any(part.ndim == 2 and part.shape[0] >= count for part in child.parameters()):
            return child
    for _, child in siblings:
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == count > 1:
            return child
    return None


def _is_gate(name: str) -> bool:
    return name.endswith("gate")
