"""A model without memory whose decoder layers get their weights from the checkpoint one at a time, and give them back."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import chain
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from fedgraft.moe.architecture import stray_text_weights
from fedgraft.moe.checkpoint import Checkpoint
from fedgraft.moe.family import layer_number, list_of_layers
from fedgraft.moe.plan import Plan

OUTSIDE = -1
"""Stands for what the decoder needs and no layer of it has: embeddings and the last norm, but not the head."""
STRAY = -2
"""Stands for tensors that the model has no place for."""
NEEDLESS = -3
"""Stands for the head, which choosing experts has no use for."""
ELEMENT = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


class LayerWeights:
    """Which tensors of a checkpoint make up which decoder layer; transformers reads and joins them, as it does for a whole model."""

    def __init__(self, plan: Plan, checkpoint: Checkpoint, device: torch.device) -> None:
        """Build the model and sort the checkpoint's names; no weight is read.

        Raises:
            ValueError: the MoE layers are not in one list of decoder layers, or the checkpoint has weights of another model.
        """
        self._plan, self._checkpoint, self.device = plan, checkpoint, device
        self.model = _without_weights(plan, device)
        self.path = list_of_layers(plan.skeleton.sites)
        self.layers: list[Any] = list(self.model.get_submodule(self.path))
        """The decoder layers, MoE or not."""
        whole = self.model.base_model is self.model  # what then runs is the model with its head
        self._decoder = "" if whole else f"{self.model.base_model_prefix}."
        self._empty: dict[int, list[tuple[Any, str, nn.Parameter]]] = {}
        self._keys = self._sorted(checkpoint.dtypes)
        found = SimpleNamespace(missing_keys=set(), unexpected_keys=set(self._keys[STRAY]))
        self.model._adjust_missing_and_unexpected_keys(found)  # some families have weights that are known to be left out
        if stray := stray_text_weights(plan.architecture, found.unexpected_keys):
            raise ValueError(f"config.json has no place for {stray[0]}; it is of another model than the weights")

    def put(self, number: int) -> None:
        """Read the weights of decoder layer `number`, or with `OUTSIDE` those.

        At its peak this holds about twice what it reads, where experts stored one by one are joined.

        Raises:
            ValueError: the checkpoint lacks one, or has one of another shape.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        dtype = self._plan.options["dtype"]
        plan = self.model._get_dtype_plan(dtype)
        config = LoadStateDictConfig(device_map={"": self.device}, dtype=dtype, dtype_plan=plan, weight_mapping=self._mapping())
        self._empty[number] = [(module, name, parameter) for module, name, parameter in self._parameters(number)]
        logging.disable_progress_bar()  # the caller has its own
        with ExitStack() as opened:
            wanted = self._keys[number]
            shards = {
                path: opened.enter_context(safe_open(path, framework="pt")) for path in {self._checkpoint.where[key] for key in wanted}
            }
            lazily = {key: shards[self._checkpoint.where[key]].get_slice(key) for key in wanted}
            found, _ = convert_and_load_state_dict_in_model(self.model, lazily, config)
        for key, stored, needed in sorted(found.mismatched_keys):
            raise ValueError(f"{key} is {list(stored)} in the checkpoint and {list(needed)} by config.json; they are of two models")
        self.model._adjust_missing_and_unexpected_keys(found)
        if lacking := sorted(name for name in found.missing_keys if self._place(name) == number):
            raise ValueError(f"the checkpoint lacks {lacking[0]}; it is incomplete, copy it again")
        for _, _, parameter in self._parameters(number):
            parameter.requires_grad_(False)

    def drop(self, number: int) -> None:
        """Give the memory of a layer back."""
        for module, name, parameter in self._empty.pop(number, []):
            setattr(module, name, parameter)

    def bytes_of(self, number: int) -> int:
        """Bytes of the checkpoint that `put` reads."""
        return sum(prod(self._checkpoint.shapes[key]) * ELEMENT.get(self._checkpoint.dtypes[key], 1) for key in self._keys[number])

    def _parameters(self, number: int) -> Iterable[tuple[Any, str, nn.Parameter]]:
        """(module, name, parameter) of everything in a layer, or outside."""
        root = self.model.base_model if number == OUTSIDE else self.layers[number]
        inside = {id(part) for part in chain.from_iterable(layer.modules() for layer in self.layers)} if number == OUTSIDE else set[int]()
        for module in root.modules():
            if id(module) not in inside:
                yield from ((module, name, parameter) for name, parameter in module.named_parameters(recurse=False))

    def _mapping(self) -> list[Any]:
        from transformers.conversion_mapping import get_model_conversion_mapping

        return list(get_model_conversion_mapping(self.model, self._plan.architecture.key_mapping or None))

    def _sorted(self, keys: Iterable[str]) -> dict[int, list[str]]:
        """The checkpoint's names by decoder layer, `OUTSIDE`, `NEEDLESS` or `STRAY`, by the names that transformers gives them."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping, own = self._mapping(), self.model.state_dict()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        found: dict[int, list[str]] = defaultdict(list)
        for key in keys:
            target, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, own)
            if target not in own and key in own:
                target, _ = rename_source_key(key, [], [], self.model.base_model_prefix, own)
            found[self._place(target) if target in own else STRAY].append(key)
        return found

    def _place(self, name: str) -> int:
        """Where a tensor of the model belongs."""
        if name.startswith(f"{self.path}."):
            number = layer_number(name)
            assert number is not None
            return number
        return OUTSIDE if name.startswith(self._decoder) else NEEDLESS


def _without_weights(plan: Plan, device: torch.device) -> Any:
    """The model as `from_pretrained` would build it, with parameters on the meta device and buffers where it computes."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    wanted = {key: plan.options[key] for key in ("dtype", "attn_implementation", "experts_implementation") if key in plan.options}
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(plan.architecture.config), trust_remote_code=False, **wanted)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model.requires_grad_(False).eval()
