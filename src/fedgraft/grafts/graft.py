"""The grafted model: one frozen base in memory, into which any client's leaves are swapped by pointer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from fedgraft.address import within
from fedgraft.grafts.lora import AttentionLora, LoraSettings
from fedgraft.grafts.side_expert import GraftSettings, SideExperts
from fedgraft.moe.load import Base
from fedgraft.tree import Tree, digest, partition

Experts = list[list[int]]
"""Source expert of every graft, [L][r]; empty when a client has no graft."""


class GraftedModel:
    """A base model with places for attention LoRA and side experts. One tree is in use at a time; not thread-safe."""

    def __init__(self, base: Base, lora: LoraSettings, graft: GraftSettings) -> None:
        """Inject the adapters and register the hooks.

        Raises:
            ValueError: a LoRA target does not exist.
        """
        self.base, self.lora_settings, self.graft_settings = base, lora, graft
        self._frozen = dict(base.model.named_parameters())
        self._attention = AttentionLora(base, lora)
        self._side = SideExperts(base, graft, lora)

    def fresh_attention(self, seed: int) -> Tree:
        """New attention LoRA leaves, the same on every site for the same seed."""
        return self._attention.fresh(seed)

    def fresh_side(self, experts: Experts, seed: int) -> Tree:
        """New leaves of the grafted experts and their gates."""
        return self._side.fresh(experts, seed)

    @contextmanager
    def using(self, tree: Mapping[str, Tensor], experts: Experts) -> Iterator[None]:
        """Predict with `tree` inside the block; the plain base model outside.

        Keep it open through `backward`: with gradient checkpointing the forward is run again there.
        """
        attention, rest = partition(dict(tree), within("attention"))
        side, unknown = partition(rest, within("side"))
        if unknown:
            raise ValueError(f"leaf {min(unknown)!r} has no place in this model")
        self._attention.put(attention)
        self._side.put(side, experts)
        try:
            yield
        finally:
            self._attention.put({})
            self._side.put({}, [])

    def frozen_digest(self) -> str:
        """Digest over every pretrained parameter, to show that none has changed."""
        return digest({name: parameter.data for name, parameter in self._frozen.items()})
