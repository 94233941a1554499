"""What MoE layers are spared, and where they are not."""

from collections.abc import Callable

import pytest
import torch

from fedgraft.data.batches import Batch, Row, collate
from fedgraft.moe.load import Base
from fedgraft.moe.routing import watching
from tests.conftest import PROVEN

ROWS = [Row([5, 6, 7, 8, 9], 2), Row([10, 11], 1), Row([12, 13, 14], 3)]
TOKENS, READ = 10, 4  # positions 1, 2, 3 of the first row and 0 of the second; the third has no response


def whole(base: Base, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return base.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[batch.predicting]


def seen(base: Base, batch: Batch) -> tuple[torch.Tensor, list[int]]:
    """(logits where they are read, how many tokens each MoE layer's experts see), without what they can be spared."""
    counts: list[int] = []
    with base.without_padding(batch.mask, batch.predicting), watching(base.sites, lambda site, routed: counts.append(len(routed.x))):
        return whole(base, batch), counts


@pytest.mark.parametrize("family", PROVEN)
def test_the_last_layer_sees_what_is_read_and_the_others_all_real_tokens(tiny_base: Callable[..., Base], family: str) -> None:
    base, batch = tiny_base(family), collate(ROWS, 0)
    assert base.compacts
    logits, counts = seen(base, batch)
    assert counts == [TOKENS, READ]
    torch.testing.assert_close(logits, whole(base, batch), rtol=1e-5, atol=1e-5)


def test_without_padding_the_last_layer_sees_what_is_read_all_the_same(tiny_base: Callable[..., Base]) -> None:
    base, batch = tiny_base("olmoe"), collate(ROWS[:1], 0)
    assert base.compacts
    logits, counts = seen(base, batch)
    assert counts == [5, 3]
    torch.testing.assert_close(logits, whole(base, batch), rtol=1e-5, atol=1e-5)


def test_where_nothing_is_read_padding_alone_is_left_out(tiny_base: Callable[..., Base]) -> None:
    """Experts need not know how to run on no tokens."""
    base, batch = tiny_base("olmoe"), collate([ROWS[2], Row([4, 5], 2)], 0)
    assert base.compacts
    assert seen(base, batch)[1] == [5, 5]


def test_a_block_that_later_layers_read_from_is_spared_padding_alone(tiny_base: Callable[..., Base]) -> None:
    """The last of three layers is dense: its attention reads all positions of the MoE layer before it."""
    base, batch = tiny_base("qwen2_moe", num_hidden_layers=3, mlp_only_layers=[2]), collate(ROWS, 0)
    assert base.compacts
    logits, counts = seen(base, batch)
    assert counts == [TOKENS, TOKENS]
    torch.testing.assert_close(logits, whole(base, batch), rtol=1e-5, atol=1e-5)
