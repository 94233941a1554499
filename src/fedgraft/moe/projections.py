"""The linear layers of a decoder, by what they do: attention projections, shared experts, state-space mixers, others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fedgraft.moe.site import Site

ROLES: dict[str, str] = {
    "q": "q_proj q_a_proj q_b_proj q_gate_proj",
    "k": "k_proj kv_proj kv_a_proj kv_a_proj_with_mqa kv_b_proj",
    "v": "v_proj v_proj_current v_proj_delayed kv_proj kv_a_proj kv_a_proj_with_mqa kv_b_proj",
    "o": "o_proj o_b_proj out_proj",
}
"""Role -> names of the modules that serve it; low-rank (multi-head latent) attention serves one with two, k and v with the same."""
FUSED = ("qkv_proj", "Wqkv", "query_key_value")
"""Modules that serve q, k and v at once."""
APART = ("compressor", "forget_gate")
"""Parts of an attention that are not its projections: what sums tokens up, or how fast it forgets."""
LEFT_OUT = ("indexer", "router", "dt_proj")
"""Parts that choose tokens or experts (no gradient passes, or they are adapted by other means), and one whose weights are read directly."""
SUFFIX = re.compile(r"_proj(?=_|$)|_with_mqa$")


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One linear layer of a decoder layer."""

    layer: int
    place: str
    """`attention`, `mixer` (state-space, linear attention, convolution: no q, k, v), `shared` (shared experts) or `linear`."""
    name: str
    """Its name inside the place, unique in a layer: q, k, v, o, q_a, kv_b, gate, up, down, ..."""
    roles: frozenset[str]
    """Of q, k, v, o; empty outside attention."""
    path: str
    """Module path, before any adapter is injected."""
    inputs: int
    outputs: int


def find_projections(model: Any, sites: Sequence[Site]) -> list[Projection]:
    """Every linear layer in the decoder layers of the stack that holds the MoE layers, dense layers included, in order.

    Routers are left out, and layers that are no plain linear maps (grouped ones, for example).
    """
    stack = re.split(r"\.\d+\.", f"{sites[0].path}.", maxsplit=1)[0]
    routers = {id(part) for site in sites for part in site.router.modules()}
    found = []
    for number, layer in model.get_submodule(stack).named_children():
        linears = {
            path: part
            for path, part in layer.named_modules()
            if _is_plain(part) and id(part) not in routers and not set(LEFT_OUT) & set(path.split("."))
        }
        attentions = _attentions(linears)
        for path, part in linears.items():
            place, name, roles = _classify(path, attentions)
            found.append(
                Projection(
                    layer=int(number),
                    place=place,
                    name=name,
                    roles=roles,
                    path=f"{stack}.{number}.{path}",
                    inputs=part.in_features,
                    outputs=part.out_features,
                )
            )
    return found


def roles_of(name: str) -> frozenset[str]:
    """The roles that a module of this name serves in an attention."""
    return frozenset("qkv") if name in FUSED else frozenset(role for role, names in ROLES.items() if name in names.split())


def _attentions(linears: dict[str, Any]) -> set[str]:
    """Children of a decoder layer that are attentions: they hold a projection for k or v."""
    return {path.split(".")[0] for path in linears if roles_of(path.rpartition(".")[2]) & {"k", "v"} and not _is_apart(path)}


def _is_apart(path: str) -> bool:
    return bool(set(APART) & set(path.split(".")))


def _classify(path: str, attentions: set[str]) -> tuple[str, str, frozenset[str]]:
    """(place, name, roles) of the linear layer at a path inside its decoder layer."""
    parts = path.split(".")
    last, short = parts[-1], SUFFIX.sub("", parts[-1])
    numbered = [part for part in parts[:-1] if part.isdigit()]  # a layer with two attentions counts them
    if any(part.startswith("shared") for part in parts[:-1]):
        return "shared", ".".join([*numbered, short]), frozenset()
    roles = roles_of(last)
    if parts[0] in attentions and roles and not _is_apart(path):
        return "attention", ".".join([*numbered, short]), roles
    if parts[0] not in attentions and len(parts) == 2 and last.startswith(("in_proj", "out_proj", "x_proj", "dt_proj")):
        return "mixer", short, frozenset()
    return "linear", path, frozenset()


def _is_plain(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) and type(part).forward is nn.Linear.forward


def of_place(projections: Sequence[Projection], *places: str) -> Iterator[Projection]:
    """The projections at these places."""
    return (projection for projection in projections if projection.place in places)
