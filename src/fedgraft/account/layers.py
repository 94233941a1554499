"""Per decoder layer, what is what: its kind, its linear layers and which are adapted, its experts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fedgraft.moe.family import Anatomy
from fedgraft.moe.projections import Projection
from fedgraft.moe.site import Site


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear layer."""

    place: str
    name: str
    roles: str
    """Of q, k, v, o, in this order; empty outside attention."""
    inputs: int
    outputs: int
    adapted: bool


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The routed experts of a layer."""

    number: int
    top_k: int
    inputs: int
    width: int
    parameters: int
    """Matrix entries of one expert."""
    shared: int
    """Matrix entries of the shared experts beside them."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One or more decoder layers that look alike."""

    numbers: tuple[int, ...]
    kind: str
    """As the configuration calls it (`full_attention`, `sliding_attention`, `linear_attention`, ...); empty where it does not."""
    window: int | None
    """Positions that its attention looks back on; None is all."""
    linears: tuple[Linear, ...]
    unreachable: tuple[str, ...]
    """Linear layers that are no plain maps, so that LoRA can't go there, with their class."""
    experts: Experts | None
    """None in a dense layer."""
    shared: int
    """Entries of the trained leaves of each that travel."""
    personal: int
    """Entries of those that stay."""

    def at(self, *places: str) -> tuple[Linear, ...]:
        """Its linear layers at these places."""
        return tuple(linear for linear in self.linears if linear.place in places)


def layers_of(anatomy: Anatomy, adapted: Collection[str], shared: Mapping[int, int], personal: Mapping[int, int]) -> list[Layer]:
    """The decoder layers in order, each alone.

    Args:
        anatomy: the model.
        adapted: paths of the linear layers that LoRA goes to.
        shared: layer number -> entries of its trained leaves that travel; without any it is absent.
        personal: the same of those that stay.
    """
    config: Any = anatomy.model.config.get_text_config()
    kinds = list(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    sites = {site.layer: site for site in anatomy.sites}
    linears: dict[int, list[Linear]] = {}
    for projection in anatomy.projections:
        linears.setdefault(projection.layer, []).append(_linear(projection, projection.path in adapted))
    routers = {id(part) for site in anatomy.sites for part in site.router.modules()}
    layers = []
    for number, module in _modules(anatomy):
        kind = str(kinds[number]) if number < len(kinds) else ""
        layers.append(
            Layer(
                numbers=(number,),
                kind=kind,
                window=window if "sliding" in kind and window else None,
                linears=tuple(linears.get(number, ())),
                unreachable=tuple(_unreachable(module, routers)),
                experts=_experts(anatomy, sites[number]) if number in sites else None,
                shared=shared.get(number, 0),
                personal=personal.get(number, 0),
            )
        )
    return layers


def alike(layers: list[Layer]) -> list[Layer]:
    """Layers that differ in nothing but their number, as one; in order of their first."""
    groups: dict[Layer, list[int]] = {}
    for layer in layers:
        groups.setdefault(replace(layer, numbers=()), []).extend(layer.numbers)
    return [replace(layer, numbers=tuple(numbers)) for layer, numbers in groups.items()]


def matrices(module: nn.Module) -> int:
    """Entries of a module's matrices, each once."""
    return sum(part.numel() for part in module.parameters() if part.ndim > 1)


def _modules(anatomy: Anatomy) -> Iterator[tuple[int, nn.Module]]:
    site = anatomy.sites[0]
    before, _, _ = f"{site.path}.".partition(f".{site.layer}.")
    for name, layer in anatomy.model.get_submodule(before).named_children():
        yield int(name), layer


def _linear(projection: Projection, adapted: bool) -> Linear:
    return Linear(
        place=projection.place,
        name=projection.name,
        roles="".join(role for role in "qkvo" if role in projection.roles),
        inputs=projection.inputs,
        outputs=projection.outputs,
        adapted=adapted,
    )


def _unreachable(layer: nn.Module, routers: Collection[int]) -> Iterator[str]:
    for path, part in layer.named_modules():
        if isinstance(part, nn.Linear) and type(part).forward is not nn.Linear.forward and id(part) not in routers:
            yield f"{path} ({type(part).__name__})"


def _experts(anatomy: Anatomy, site: Site) -> Experts:
    return Experts(
        number=site.num_experts,
        top_k=site.top_k,
        inputs=site.inputs_width,
        width=site.width,
        parameters=sum(weight.numel() for weight in anatomy.family.expert(site, 0).projections().values()),
        shared=sum(matrices(module) for module in site.shared),
    )
