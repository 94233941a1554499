"""What OpenAI's clients send and get. Fields without effect here are ignored, those that would change the answer are refused."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fedgraft.use.answer import Answer

WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that are not supported -> the values at which they change nothing; null is always one."""


def _whole(text: str) -> str:
    """Text without halves of characters, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half a character (a lone UTF-16 surrogate)") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]


class StreamOptions(BaseModel):
    """Of a request with `stream`."""

    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of completion share."""

    model_config = ConfigDict(extra="allow")

    model: Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            neutral = WITHOUT_EFFECT.get(name)
            if neutral is not None and value is not None and value not in neutral:
                raise ValueError(f"{name} is not supported; leave it out")
        if "" in self.stops:
            raise ValueError("stop: an empty text would end every answer at once")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def most(self) -> int | None:
        """Tokens that the answer may have."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def counts(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class Part(BaseModel):
    """One part of a message; text alone is understood."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn of a chat."""

    role: Text
    content: Text | list[Part]

    @property
    def turn(self) -> dict[str, str]:
        """Role and text."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": {"developer": "system"}.get(self.role, self.role), "content": content}


class ChatRequest(Request):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]


Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Request):
    """`/v1/completions`: text or tokens to be continued, without any words around them."""

    prompt: Text | Tokens | Annotated[list[Text] | list[Tokens], Field(min_length=1, max_length=64)]

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Every prompt as text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The documents of one response, whole or as a stream."""

    model: str
    chat: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The response in one document."""
        choices = []
        for index, answer in enumerate(answers):
            text = {"message": {"role": "assistant", "content": answer.text}} if self.chat else {"text": answer.text}
            choices.append({"index": index, **text, "logprobs": None, "finish_reason": answer.reason})
        return self._document("chat.completion" if self.chat else "text_completion", choices) | {"usage": usage(answers)}

    def opening(self) -> dict[str, Any]:
        """The first chunk of a chat."""
        return self._chunk(0, {"role": "assistant", "content": ""}, "", None)

    def piece(self, index: int, text: str, reason: str | None = None) -> dict[str, Any]:
        """A chunk with new text, or with the reason of the end."""
        return self._chunk(index, {"content": text} if text or not reason else {}, text, reason)

    def closing(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The chunk with the numbers of tokens."""
        return self._document("chat.completion.chunk" if self.chat else "text_completion", []) | {"usage": usage(answers)}

    def _chunk(self, index: int, delta: dict[str, str], text: str, reason: str | None) -> dict[str, Any]:
        own: dict[str, Any] = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": index, **own, "logprobs": None, "finish_reason": reason}
        return self._document("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def _document(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Numbers of tokens."""
    read, written = sum(len(answer.wish.prompt) for answer in answers), sum(len(answer.written) for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
