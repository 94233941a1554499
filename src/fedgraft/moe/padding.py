"""Right-padded batches through MoE layers without what nobody reads there: padding, and in the last layer all positions without a loss.

Padding is often half of the tokens and of these layers' work; prompts are often half of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedgraft.moe.family import Anatomy
from fedgraft.moe.site import first_output, with_hidden

EXACT, ROUNDED = 1e-4, 0.03  # relative differences below these are rounding: of fp32, of anything shorter


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """What the MoE blocks of a model can be spared."""

    padding: bool
    """Padding, in all blocks."""
    unread: bool
    """In the last block all positions whose logits are not read."""

    @classmethod
    def tried(cls, anatomy: Anatomy, device: torch.device) -> Self:
        """Find out, in evaluation mode."""
        padding = can_compact(anatomy, device)
        return cls(padding=padding, unread=padding and ends_with_block(anatomy, device))


@contextmanager
def compacted(blocks: Sequence[nn.Module], mask: Tensor, missing: float = 0.0) -> Iterator[None]:
    """In a forward of rows of tokens [B, L] the blocks see the N of this mask alone, as one row [1, N, H]; the others come out `missing`.

    What is hooked inside a block sees N tokens too, in the order of the rows.
    """
    chosen = mask.flatten().nonzero().flatten()
    handles = (
        [handle for block in blocks for handle in _hooked(block, chosen, tuple(mask.shape), missing)] if len(chosen) < mask.numel() else []
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def spared(blocks: Sequence[nn.Module], mask: Tensor, read: Tensor | None = None) -> Iterator[None]:
    """`compacted` by the padding `mask` [B, L]; the last block by the positions that are `read` [B, L], where there are any."""
    if read is None or not bool(read.any()):
        with compacted(blocks, mask):
            yield
        return
    with compacted(blocks[:-1], mask), compacted(blocks[-1:], mask.bool() & read):
        yield


def can_compact(anatomy: Anatomy, device: torch.device) -> bool:
    """Whether the model's MoE blocks treat every token by itself, so that what they make of one does not depend on the others there.

    Blocks that hold the attention don't, nor do those that read more than hidden states. It is tried out: call it in evaluation mode.
    """
    blocks = [site.path.rpartition(".")[0] + "." for site in anatomy.sites]
    if any(projection.roles and projection.path.startswith(block) for projection in anatomy.projections for block in blocks):
        return False
    mask = _example(device)
    return _is_the_same(anatomy, mask, mask, lambda: compacted([site.block for site in anatomy.sites], mask))


def ends_with_block(anatomy: Anatomy, device: torch.device) -> bool:
    """Whether what the last MoE block makes of a position reaches the logits of this position alone, as when it is in the last layer.

    It is tried out, for a model that `can_compact`: whatever else is read is not a number.
    """
    mask = _example(device)
    read = mask.bool()
    read[:, ::2] = False
    return _is_the_same(anatomy, mask, read, lambda: compacted([anatomy.sites[-1].block], read, missing=float("nan")))


def _example(device: torch.device) -> Tensor:
    """The mask of two rows, one of which has padding."""
    mask = torch.ones(2, 8, dtype=torch.int64, device=device)
    mask[1, 3:] = 0
    return mask


@torch.no_grad()
def _is_the_same(anatomy: Anatomy, mask: Tensor, read: Tensor, sparing: Callable[[], Any]) -> bool:
    """Whether a forward in `sparing()` gives the same logits where they are `read`, to rounding."""
    ids = torch.arange(mask.numel(), device=mask.device).view_as(mask) % anatomy.model.config.get_text_config().vocab_size
    try:
        plain = anatomy.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        with sparing():
            spare = anatomy.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError):  # an architecture's own code, which wants all tokens
        return False
    plain, spare = plain[read.bool()].double(), spare[read.bool()].double()
    rounding = EXACT if anatomy.model.dtype == torch.float32 else ROUNDED
    return bool((spare - plain).norm() <= rounding * plain.norm())


def _hooked(block: nn.Module, chosen: Tensor, shape: tuple[int, ...], missing: float) -> Iterator[Any]:
    yield block.register_forward_pre_hook(_taking(chosen, shape), with_kwargs=True)
    yield block.register_forward_hook(_giving_back(chosen, shape, missing))


def _taking(chosen: Tensor, shape: tuple[int, ...]) -> Callable[..., Any]:
    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if tuple(hidden.shape[:2]) != shape:
            raise ValueError(f"a block that sees {list(hidden.shape)} in place of {list(shape)} tokens")
        own = hidden.flatten(0, 1).index_select(0, chosen.to(hidden.device))[None]
        return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": own})

    return take


def _giving_back(chosen: Tensor, shape: tuple[int, ...], missing: float) -> Callable[..., Any]:
    def give_back(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = first_output(output)
        own = hidden.reshape(len(chosen), -1)
        whole = own.new_full((shape[0] * shape[1], own.shape[1]), missing).index_copy(0, chosen.to(own.device), own)
        return with_hidden(output, whole.view(*shape, -1) if hidden.dim() == 3 else whole)

    return give_back
