"""Reading a pretrained parameter where it really is: in memory, quantised, or kept elsewhere by accelerate between forwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def plain(weight: Tensor) -> Tensor:
    """An ordinary tensor: `weight` itself, or the values a quantised tensor stands for, which is a copy."""
    if type(weight) in {Tensor, nn.Parameter}:
        return weight
    values: Tensor = weight.dequantize()
    return values


def stored(module: nn.Module, name: str) -> Tensor:
    """The parameter `name`; of an offloaded module, whose own is empty between forwards, the copy that accelerate keeps."""
    weight: Tensor = getattr(module, name)
    if weight.device.type == "meta":
        for hook in _hooks(module):
            if getattr(hook, "weights_map", None) is not None:
                weight = hook.weights_map[name]
    return weight


def part(module: nn.Module, name: str, index: int) -> Tensor:
    """Slice `index` of a fused parameter, plain and where the module computes: a view, unless it is quantised or offloaded."""
    values = plain(stored(module, name)[index].detach())
    return values.to(compute_device(module)) if _hooks(module) else values  # looking a device up takes longer than many an expert


def is_offloaded(module: nn.Module) -> bool:
    """Whether parameters of `module` are elsewhere between forwards."""
    return any(parameter.device.type == "meta" for parameter in module.parameters())


def keep_in_memory(module: nn.Module) -> None:
    """Take an offloaded module back to where it computes, for good."""
    from accelerate.hooks import remove_hook_from_module

    for inner in module.modules():
        names = [name for name, parameter in inner.named_parameters(recurse=False) if parameter.device.type == "meta"]
        if names and _hooks(inner):
            device = compute_device(inner)
            values = {name: stored(inner, name).to(device, copy=True) for name in names}
            remove_hook_from_module(inner)
            for name, value in values.items():
                setattr(inner, name, nn.Parameter(value, requires_grad=False))


def vectors(module: nn.Module) -> list[nn.Module]:
    """The modules inside with vectors alone: norms and scales."""
    return [part for part in module.modules() if {parameter.ndim for parameter in part.parameters()} == {1}]


def compute_device(module: nn.Module) -> torch.device:
    """Where `module` computes: accelerate's choice for a dispatched model, else where its parameters lie."""
    for hook in _hooks(module):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next(module.parameters()).device


def _hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
