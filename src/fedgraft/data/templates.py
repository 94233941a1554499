"""The words around instruction and response, and their token ids.

Whatever the template, a prompt is the same tokens in training and in generation: it is tokenised by itself, and the response's tokens
follow it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fedgraft.data.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stanford Alpaca's wording for rows without a separate input; a space separates the response, as in the code released with FLEx.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
MARK = "xqresponseqx"  # stands for the assistant's words when a chat template is asked what surrounds them


def question(example: Example) -> str:
    """The instruction, and after a blank line the context."""
    return f"{example.instruction}\n\n{example.context}" if example.context else example.instruction


def prompt_and_lead(example: Example, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str]:
    """(prompt text, white space that the template puts between it and the response).

    Raises:
        ValueError: the template cannot hold this example.
    """
    return TEMPLATES[template](example, tokenizer)


@lru_cache(maxsize=16)
def end_id(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
    """The token that closes a response, on which generation must stop: of `chat` the marker the template writes, else the eos token.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    if template == "chat":
        tail = _render([{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}], tokenizer, "").rsplit(MARK, 1)[1]
        markers = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        marker = next((token for token in token_ids(tail, tokenizer) if token in markers), None)
        if marker is not None:
            return marker
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ValueError("the tokenizer has no end-of-sequence token; set its eos_token")
    return eos


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text, without any that the tokenizer would add around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _chat(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """All that the template writes before the assistant's words: also an empty thinking block, which a generation prompt leaves open."""
    turns = [*example.turns, ("user", question(example)), ("assistant", MARK)]
    text = _render([{"role": role, "content": content} for role, content in turns], tokenizer, example.id)
    prompt = text.rsplit(MARK, 1)[0]
    return prompt.rstrip(" "), prompt[len(prompt.rstrip(" ")) :]


def _alpaca(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if example.turns:
        raise ValueError(f"row {example.id!r} has earlier chat turns, which the alpaca template cannot hold; set data.template: chat")
    return _opening(tokenizer) + ALPACA.replace("{instruction}", question(example)), " "


@lru_cache(maxsize=16)
def _opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning-of-sequence token where this tokenizer writes one by itself (chat templates write their own)."""
    bos = tokenizer.bos_token_id
    return str(tokenizer.bos_token) if bos is not None and tokenizer("x")["input_ids"][0] == bos else ""


def _render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, row: str) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; set data.template: alpaca")
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        raise ValueError(f"row {row!r}: the chat template refuses it ({error}); change its turns or set data.template: alpaca") from error
    if MARK not in text:
        raise ValueError("the tokenizer's chat template does not write the assistant's words; set data.template: alpaca")
    return text


TEMPLATES: dict[str, Callable[[Example, PreTrainedTokenizerBase], tuple[str, str]]] = {"chat": _chat, "alpaca": _alpaca}
