"""What one request, and all of them together, may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of a server; whatever exceeds one is refused before the model sees it."""

    batch: int = 16
    """Answers written at the same time."""
    queue: int = 256
    """Requests that wait; more are refused with 429."""
    prompt_tokens: int | None = None
    """Tokens of a prompt; None: what the base can hold. Longer ones are refused with 400."""
    default_tokens: int = 256
    """Tokens of an answer where a request does not say."""
    answer_tokens: int = 1024
    """Tokens of an answer at most; a request for more gets so many."""
    body_bytes: int = 1 << 20
    """Size of a request; larger ones are refused with 413."""
    prefill_tokens: int = 8192
    """Prompt tokens, padding included, that are read in one forward; a longer prompt is read alone."""
    grace: float = 30.0
    """Seconds that answers in the making have to end when the server stops."""
