"""Loss on general text."""

from __future__ import annotations

import pytest
import torch

from fedgraft.data.general_text import general_texts
from fedgraft.evaluation.knowledge import WINDOW, general_loss, windows


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (WINDOW, 1), (WINDOW + 1, 2), (3 * WINDOW, 3)])
def test_windows_are_the_shipped_text_cut_in_pieces(tiny_tokenizer, tokens, count):
    pieces = windows(tiny_tokenizer, tokens)
    assert pieces.shape == (count, WINDOW)
    whole = [token for text in general_texts()[:8] for token in [*tiny_tokenizer(text)["input_ids"], tiny_tokenizer.eos_token_id]]
    assert pieces.flatten().tolist() == whole[: count * WINDOW]


def test_more_tokens_than_there_are_take_all_of_them(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("fedgraft.evaluation.knowledge.general_texts", lambda: ("x" * WINDOW, "y" * WINDOW))
    assert windows(tiny_tokenizer, 10**9).shape == (2, WINDOW)


def test_general_loss_is_the_mean_over_all_predicted_tokens(tiny_base):
    base = tiny_base("olmoe")
    pieces = windows(base.tokenizer, 9 * WINDOW)  # more than one batch
    assert len(pieces) == 9
    nats = []
    for piece in pieces:
        with torch.no_grad():
            probabilities = base.model(piece[None]).logits[0].double().softmax(-1)
        nats += (-probabilities[range(WINDOW - 1), piece[1:]].log()).tolist()
    assert general_loss(base, 9 * WINDOW, "fp32") == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_the_shipped_text_is_long_enough_for_the_default():
    """8,192 tokens are at most that many bytes times the longest token; characters alone suffice here."""
    assert sum(map(len, general_texts())) > 8 * 8_192
