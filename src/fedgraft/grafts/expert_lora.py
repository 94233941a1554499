"""LoRA on every routed expert, for the baselines that adapt them all: 3 pairs per expert and layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedgraft import address
from fedgraft.grafts.lora import LoraSettings, Pairs, Shapes, pair_shapes
from fedgraft.moe.family import Anatomy
from fedgraft.moe.site import Site


class ExpertPairs:
    """A dispatch of our own in place of the experts modules' forward; without leaves in use the model's own runs."""

    def __init__(self, anatomy: Anatomy, settings: LoraSettings) -> None:
        """Put the dispatch in place.

        Raises:
            ValueError: as `expert_shapes`.
        """
        expert_shapes(anatomy, settings)
        self.anatomy, self.settings = anatomy, settings
        self._active: dict[int, dict[int, Pairs]] = {}
        for site in anatomy.sites:
            site.experts.forward = self._dispatch(site, site.experts.forward)

    def put(self, tree: Mapping[str, Tensor]) -> set[str]:
        """Use the pairs of `tree` and return their addresses; an expert without runs as pretrained. Pointer work only."""
        found: dict[tuple[int, int], dict[str, Tensor]] = {}
        used = set()
        for key, leaf in tree.items():
            if address.place_of(key) == "expert":
                number, name = key.split(".", 4)[3:]
                found.setdefault((address.layer_of(key), int(number)), {})[name] = leaf
                used.add(key)
        self._active = {}
        for (layer, index), leaves in found.items():
            self._active.setdefault(layer, {})[index] = Pairs(leaves, self.settings)
        return used

    def _dispatch(self, site: Site, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            held = self._active.get(site.layer)
            if not held:
                return own(*args, **kwargs)
            x, (index, weight) = site.inputs((args, kwargs)), site.routing(site, (args, kwargs))
            total = torch.zeros_like(x)
            for number in index.unique().tolist():
                token, place = torch.where(index == number)
                output = self._expert(site, held, number, x[token])
                total = total.index_add(0, token, (output * weight[token, place, None]).to(total.dtype))
            return total.view_as(args[0] if args else kwargs["hidden_states"])

        return forward

    def _expert(self, site: Site, held: Mapping[int, Pairs], number: int, x: Tensor) -> Tensor:
        if site.identity and number >= site.num_experts:
            return x
        source = self.anatomy.family.expert(site, number)
        return held[number].run(source, x, self.anatomy.model.training) if number in held else source(x)


def expert_shapes(anatomy: Anatomy, settings: LoraSettings) -> Shapes:
    """Shapes of the pairs on all routed experts.

    Raises:
        ValueError: the experts are not called one by one.
    """
    shapes: Shapes = {}
    for site in anatomy.sites:
        if not site.replaceable:
            raise ValueError(
                f"lora.targets: the experts of {site.path} do not run one by one, so they can't be adapted; leave 'experts' out"
            )
        weights = anatomy.family.expert(site, 0).projections()
        for index in range(site.num_experts):
            for name, weight in weights.items():
                shapes |= pair_shapes(address.expert(site.layer, index, name), settings.rank, weight.shape[1], weight.shape[0])
    return shapes
