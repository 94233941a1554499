"""A model's tokenizer without its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedgraft.moe.hub import hub_config
from fedgraft.moe.plan import locate
from fedgraft.moe.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 1 << 20  # transformers writes a far larger number where a tokenizer states no limit


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `demo`, of a local folder or of a hub name (a few megabytes are downloaded).

    Raises:
        ValueError: no such model, or nothing to tokenise with.
    """
    from transformers import AutoTokenizer

    folder = locate(name)
    if folder is None:
        hub_config(ModelSettings(name=name))  # says in one line what is wrong with a name, where transformers would retry for long
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name if folder is None else folder)
    except (OSError, KeyError) as error:
        raise ValueError(f"model.name {name!r}: its tokenizer cannot be loaded ({error})") from error
    return tokenizer


def stated_limit(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The longest row that the tokenizer's files allow; None where they state none."""
    limit = int(tokenizer.model_max_length)
    return limit if limit < LONGEST else None
