"""`Base.logits_at` picks from what the whole model computes."""

from collections.abc import Callable

import pytest
import torch

from fedgraft.data.batches import Row, collate
from fedgraft.moe.load import Base

ROWS = [Row([5, 6, 7, 8, 9], 2), Row([10, 11], 1), Row([12, 13, 14], 0)]


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "mixtral"])
def test_gives_the_logits_of_the_chosen_positions_in_order_and_all_of_them_afterwards(tiny_base: Callable[..., Base], family: str) -> None:
    base, batch = tiny_base(family), collate(ROWS, 0)
    whole = base.model(input_ids=batch.ids, attention_mask=batch.mask).logits
    with base.logits_at(batch.predicting):
        picked = base.model(input_ids=batch.ids, attention_mask=batch.mask).logits
    expected = torch.stack([whole[row, position] for row, position in [(0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (2, 1)]])
    torch.testing.assert_close(picked, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(base.model(input_ids=batch.ids, attention_mask=batch.mask).logits, whole)


def test_the_hook_goes_also_when_the_forward_fails(tiny_base: Callable[..., Base]) -> None:
    base, batch = tiny_base("olmoe"), collate(ROWS, 0)
    with pytest.raises(IndexError), base.logits_at(torch.ones(7, 7, dtype=torch.bool)):
        base.model(input_ids=batch.ids, attention_mask=batch.mask)
    assert base.model(input_ids=batch.ids).logits.shape == (*batch.ids.shape, base.model.config.vocab_size)


def test_targets_are_the_tokens_after_the_predicting_positions() -> None:
    batch = collate(ROWS, 0)
    following = [int(batch.ids[row, position + 1]) for row, position in batch.predicting.nonzero().tolist()]
    assert batch.targets.tolist() == following == [7, 8, 9, 11, 13, 14]
    assert batch.response_tokens == len(following)
