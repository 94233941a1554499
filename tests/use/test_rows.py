"""Rows of one batch predicted by different models of a run."""

from __future__ import annotations

import pytest
import torch

import fedgraft


def logits(loaded, rows):
    ids = torch.arange(10, 10 + 9 * len(rows)).reshape(len(rows), 9)
    with torch.no_grad():
        with loaded.rows(rows) as model:
            mixed = model(input_ids=ids, use_cache=False).logits
        alone = []
        for row, name in enumerate(rows):
            with loaded.using(name) as model:
                alone.append(model(input_ids=ids[row : row + 1], use_cache=False).logits[0])
    return mixed, torch.stack(alone)


@pytest.mark.parametrize("method", ["flex", "fedex_lora", "flora", "hetlora", "apfl", "fdlora", "fedrep"])
def test_a_mixed_batch_is_each_model_alone(trained, method):
    """Single precision, so to 1e-4; another set of clients than the last, a part of it, and one client alone."""
    options = {"hetlora": {"ranks": [2, 1]}, "fdlora": {"evaluations": 3, "rows": 2}, "fedrep": {"layers": 1}}
    loaded = fedgraft.load(trained(method, method=options.get(method, {})).folder, "bakery")
    for rows in (["garden", "base", "harbour", "garden", "bakery"], ["harbour", "base"], ["garden"] * 3, ["base", "garden"]):
        mixed, alone = logits(loaded, rows)
        torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-4)
        assert len({float(row.sum()) for row in alone}) > 1
    assert loaded.client == "bakery"
    before, _ = logits(loaded, ["bakery"])
    torch.testing.assert_close(before, loaded.model(input_ids=torch.arange(10, 19)[None], use_cache=False).logits, rtol=0, atol=0)


def test_what_can_t_be_mixed_says_so(trained):
    loaded = fedgraft.load(trained("fedavg", lora={"targets": ["q", "router"]}).folder)
    assert not loaded.mixes
    with pytest.raises(ValueError, match=r"base, garden can't stand in one batch"), loaded.rows(["base", "garden", "base"]):
        pass
    with loaded.rows(["garden", "garden"]):
        assert loaded.client == "garden"
    assert loaded.client == "base"
    mixing = fedgraft.load(trained("flex").folder)
    with pytest.raises(ValueError, match="no model 'nobody'"), mixing.rows(["base", "nobody"]):
        pass
    assert mixing.client == "base"
