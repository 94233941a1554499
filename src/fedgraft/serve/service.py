"""What the routes ask: which models there are, and answers to requests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from fedgraft.serve.limits import Limits
from fedgraft.serve.metrics import Metrics
from fedgraft.serve.protocol import ChatRequest, CompletionRequest, Request
from fedgraft.serve.refusal import Refusal
from fedgraft.serve.scheduler import Job, Scheduler, Told
from fedgraft.use.answer import Answer, Wish
from fedgraft.use.loaded import Loaded

Heard = tuple[int, Told]
"""Number of the answer within its request, and what was told."""


class Service:
    """A loaded run, its queue and its counters."""

    def __init__(self, loaded: Loaded, limits: Limits) -> None:
        """Read the leaves of every model, so that a request waits for none; those that can't be used are named in `missing`."""
        self.loaded, self.limits, self.metrics = loaded, limits, Metrics()
        self.models: list[str] = []
        self.missing: dict[str, str] = {}
        for name in loaded.models:
            try:
                loaded.fitted(name)
                self.models.append(name)
            except ValueError as error:
                self.missing[name] = str(error)
        self.created = int(time.time())
        self.scheduler = Scheduler(loaded, limits, self.metrics)
        longest = loaded.longest
        self._longest = min(limits.prompt_tokens or longest or 1 << 20, (longest or 1 << 20) - 1)
        self._tokenising = threading.Lock()

    def check(self, model: str, allowed: frozenset[str]) -> None:
        """The asker may use this model.

        Raises:
            Refusal: 404, there is none; 403, it is another's.
        """
        if model not in self.models:
            why = f" {self.missing[model]}" if model in self.missing and model in allowed else ""
            raise Refusal(404, f"The model {model!r} does not exist.{why}", "model_not_found", "model")
        if model not in allowed:
            raise Refusal(403, f"This API key does not open the model {model!r}.", "not_allowed", "model")

    async def wishes(self, request: ChatRequest | CompletionRequest) -> list[Wish]:
        """What a request asks for, tokenised beside the event loop.

        Raises:
            Refusal: 400, turns that the run's template cannot hold, or a prompt that is empty or too long.
        """
        return await asyncio.to_thread(self._wishes, request)

    def _wishes(self, request: ChatRequest | CompletionRequest) -> list[Wish]:
        chat = isinstance(request, ChatRequest)
        with self._tokenising:
            if isinstance(request, ChatRequest):
                try:
                    prompts = [self.loaded.prompt([message.turn for message in request.messages], 1 << 30)]
                except ValueError as error:
                    raise Refusal(400, str(error), "invalid_messages", "messages") from None
            else:
                prompts = [self._tokens(prompt) for prompt in request.prompts]
        return [self._wish(request, prompt, verbatim=not chat) for prompt in prompts]

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids: list[int] = self.loaded.tokenizer(prompt, verbose=False)["input_ids"]
            return ids
        known = self.loaded.model.config.get_text_config().vocab_size
        if max(prompt) >= known:
            raise Refusal(400, f"prompt: token {max(prompt)} is none of the model's {known}.", "invalid_prompt", "prompt")
        return prompt

    def _wish(self, request: Request, prompt: list[int], verbatim: bool) -> Wish:
        if not prompt:
            raise Refusal(400, "The prompt is empty.", "invalid_prompt", "prompt")
        if len(prompt) > self._longest:
            told = f"The prompt has {len(prompt)} tokens; at most {self._longest} are taken."
            raise Refusal(400, told, "context_length_exceeded", "prompt" if verbatim else "messages")
        most = min(request.most or self.limits.default_tokens, self.limits.answer_tokens)
        if self.loaded.longest is not None:
            most = min(most, self.loaded.longest - len(prompt))
        return Wish(
            client=request.model,
            prompt=prompt,
            most=most,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=request.stops,
            verbatim=verbatim,
        )

    def submit(self, wishes: Sequence[Wish], streams: bool) -> Hearing:
        """Queue the answers of a request.

        Raises:
            Refusal: 429 or 503.
        """
        hearing = Hearing(wishes, streams)
        self.scheduler.submit(hearing.jobs)
        return hearing


class Hearing:
    """The answers of one request as the event loop hears of them."""

    def __init__(self, wishes: Sequence[Wish], streams: bool) -> None:
        """Must be made in the event loop."""
        self._loop, self._heard = asyncio.get_running_loop(), asyncio.Queue[Heard]()
        self.jobs = [Job(wish, self._teller(index), streams) for index, wish in enumerate(wishes)]

    @property
    def answers(self) -> list[Answer]:
        """The answers, finished once `told` is exhausted."""
        return [job.answer for job in self.jobs]

    async def told(self, gone: Callable[[], Any] | None = None) -> AsyncIterator[Heard]:
        """Everything until all answers are finished; `gone` is asked every second whether the asker has left.

        Raises:
            Refusal: an answer failed.
        """
        left = len(self.jobs)
        try:
            while left:
                try:
                    index, told = await asyncio.wait_for(self._heard.get(), 1)
                except TimeoutError:
                    if gone is not None and await gone():
                        return
                    continue
                if told.failure is not None:
                    raise told.failure
                left -= told.answer is not None
                yield index, told
        finally:
            for job in self.jobs:
                job.gone = True

    def _teller(self, index: int) -> Callable[[Told], None]:
        def tell(told: Told) -> None:
            with suppress(RuntimeError):  # the event loop has ended meanwhile
                self._loop.call_soon_threadsafe(self._heard.put_nowait, (index, told))

        return tell
