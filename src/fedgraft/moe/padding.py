"""Right-padded batches through MoE layers without their padding, which is often half of the tokens and of these layers' work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedgraft.moe.family import Anatomy
from fedgraft.moe.site import first_output, with_hidden

EXACT, ROUNDED = 1e-4, 0.03  # relative differences below these are rounding: of fp32, of anything shorter


@contextmanager
def compacted(blocks: Sequence[nn.Module], mask: Tensor) -> Iterator[None]:
    """In a forward of rows with this mask [B, L] the blocks see the N real tokens alone, as one row [1, N, H]; padding comes out as zeros.

    What is hooked inside a block sees N tokens too, in the order of the rows.
    """
    real = mask.flatten().nonzero().flatten()
    handles = [handle for block in blocks for handle in _hooked(block, real, tuple(mask.shape))] if len(real) < mask.numel() else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def can_compact(anatomy: Anatomy, device: torch.device) -> bool:
    """Whether the model's MoE blocks treat every token by itself, so that what they make of one does not depend on the others there.

    Blocks that hold the attention don't, nor do those that read more than hidden states. It is tried out: call it in evaluation mode.
    """
    blocks = [site.path.rpartition(".")[0] + "." for site in anatomy.sites]
    if any(projection.roles and projection.path.startswith(block) for projection in anatomy.projections for block in blocks):
        return False
    ids = torch.arange(16, device=device).view(2, 8) % anatomy.model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    try:
        with torch.no_grad():
            plain = anatomy.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            with compacted([site.block for site in anatomy.sites], mask):
                compact = anatomy.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError):  # an architecture's own code, which wants all tokens
        return False
    real = mask.bool()
    plain, compact = plain[real].double(), compact[real].double()
    rounding = EXACT if anatomy.model.dtype == torch.float32 else ROUNDED
    return bool((compact - plain).norm() <= rounding * plain.norm())


def _hooked(block: nn.Module, real: Tensor, shape: tuple[int, ...]) -> Iterator[Any]:
    yield block.register_forward_pre_hook(_taking(real, shape), with_kwargs=True)
    yield block.register_forward_hook(_giving_back(real, shape))


def _taking(real: Tensor, shape: tuple[int, ...]) -> Callable[..., Any]:
    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if tuple(hidden.shape[:2]) != shape:
            raise ValueError(f"a block that sees {list(hidden.shape)} in place of {list(shape)} tokens")
        own = hidden.flatten(0, 1).index_select(0, real.to(hidden.device))[None]
        return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": own})

    return take


def _giving_back(real: Tensor, shape: tuple[int, ...]) -> Callable[..., Any]:
    def give_back(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = first_output(output)
        own = hidden.reshape(len(real), -1)
        whole = own.new_zeros(shape[0] * shape[1], own.shape[1]).index_copy(0, real.to(own.device), own)
        return with_hidden(output, whole.view(*shape, -1) if hidden.dim() == 3 else whole)

    return give_back
