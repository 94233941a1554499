"""The router's rows as leaves: a full copy [E, H] per MoE layer, in use in place of the pretrained one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fedgraft import address
from fedgraft.grafts.lora import Shapes
from fedgraft.moe.family import Anatomy, router_matrix
from fedgraft.moe.site import Site
from fedgraft.tree import Tree


class RouterRows:
    """Hooks around every router; without leaves in use it runs untouched."""

    def __init__(self, anatomy: Anatomy) -> None:
        """Register the hooks.

        Raises:
            ValueError: as `router_shapes`.
        """
        router_shapes(anatomy)
        self.sites = anatomy.sites
        self._active: dict[int, Tensor] = {}
        for site in anatomy.sites:
            owner, name = _owner(site)
            frozen = owner._parameters[name]
            assert frozen is not None
            site.router.register_forward_pre_hook(self._before(site.layer, owner, name, frozen))
            site.router.register_forward_hook(self._after(owner, name, frozen), always_call=True)

    def put(self, tree: Mapping[str, Tensor]) -> set[str]:
        """Use the rows of `tree` and return their addresses; a layer without keeps its pretrained rows. Pointer work only."""
        keys = {site.layer: address.router(site.layer) for site in self.sites}
        self._active = {layer: tree[key] for layer, key in keys.items() if key in tree}
        return {keys[layer] for layer in self._active}

    def fresh(self) -> Tree:
        """Copies of the pretrained rows, fp32 on the CPU."""
        return {address.router(site.layer): _matrix(site).detach().float().cpu().clone() for site in self.sites}

    def _before(self, layer: int, owner: nn.Module, name: str, frozen: nn.Parameter) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if layer in self._active:  # cast anew in every forward, so that each backward has a graph of its own
                owner._parameters[name] = self._active[layer].to(frozen.dtype)  # type: ignore[assignment]

        return hook

    def _after(self, owner: nn.Module, name: str, frozen: nn.Parameter) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            owner._parameters[name] = frozen

        return hook


def router_shapes(anatomy: Anatomy) -> Shapes:
    """Shapes of the router leaves.

    Raises:
        ValueError: a router is no linear map of the experts' inputs.
    """
    return {address.router(site.layer): tuple(_matrix(site).shape) for site in anatomy.sites}


def _matrix(site: Site) -> nn.Parameter:
    matrix = router_matrix(site)
    if matrix is None:
        raise ValueError(f"lora.targets: the router of {site.path} is no linear map of the experts' inputs; leave 'router' out")
    return matrix


def _owner(site: Site) -> tuple[nn.Module, str]:
    """The module that holds the router's matrix, and its name there."""
    matrix = _matrix(site)
    return next((part, name) for part in site.router.modules() for name, own in part._parameters.items() if own is matrix)
