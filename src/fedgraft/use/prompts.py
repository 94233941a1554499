"""From what a user says to the tokens after which an answer begins: the words around it are those of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedgraft.data.batches import prompt_ids
from fedgraft.data.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")


def prompt_of(messages: str | Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, template: str, longest: int) -> list[int]:
    """The prompt's tokens, at most `longest`; those of a training row wherever one was not cut.

    Raises:
        ValueError: as `example_of`; turns that the template cannot hold; no room.
    """
    return prompt_ids(example_of(messages), tokenizer, template, longest)


def example_of(messages: str | Sequence[Mapping[str, str]], row: str = "prompt") -> Example:
    """A row without response: the last user's message is its instruction, the others are its turns.

    Raises:
        ValueError: no message, one without text, an unknown role, or another's than the user's at the end; names `row`.
    """
    turns = [("user", messages)] if isinstance(messages, str) else [_turn(message, row) for message in messages]
    if not turns or turns[-1][0] != "user":
        raise ValueError(f"{row}: the last message must be the user's (role: user)")
    if not turns[-1][1].strip():
        raise ValueError(f"{row}: the user's last message is empty")
    return Example(row, "", turns[-1][1].strip(), "", "", tuple(turns[:-1]))


def _turn(message: Mapping[str, str], row: str) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{row}: a message has role {role!r}; choose from {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"{row}: the {role}'s message has no text as content")
    return role, content
