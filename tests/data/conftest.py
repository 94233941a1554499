"""A tokenizer with one token per byte (and one for a blank line), with a ChatML template."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import CHAT_TEMPLATE, END, TURN, TURN_END

SPECIAL = [END, TURN, TURN_END]


def build(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    model = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[("Ċ", "Ċ")])
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=TURN_END, pad_token=END, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build()


@pytest.fixture(scope="session")
def make_tokenizer():
    return build
