"""Text that loaded models write: for many prompts at once, or as it comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fedgraft import seeds
from fedgraft.data.example import Example
from fedgraft.data.templates import question
from fedgraft.evaluation.answers import continuations
from fedgraft.use.loaded import Loaded


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: always the likeliest."""
    top_p: float = 1.0
    """Only the likeliest tokens that make up this probability are drawn from."""
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """What transformers' `generate` is given; all of a checkpoint's own choices are put aside."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0, "num_beams": 1}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return chosen | (drawn if self.temperature > 0 else {"temperature": None, "top_p": None, "top_k": None})


def write_answers(
    loaded: Loaded, client: str, prompts: Sequence[Example], sampling: Sampling, batch_size: int, done: Callable[[], None] = lambda: None
) -> list[str]:
    """One model's answer to every prompt, batched with a KV cache.

    Drawn ones are a function of seed, model, prompts and batch size. `done` is called after each.

    Raises:
        ValueError: as `Loaded.prediction`, `Loaded.prompt` and `Loaded.room`.
    """
    room = loaded.room(sampling.max_new_tokens)
    rows = [loaded.prompt(prompt, room) for prompt in prompts]
    answers = [""] * len(rows)
    with loaded.using(client), seeds.torch_default(seeds.derive(sampling.seed, "write", client)):
        for index, ids in continuations(loaded.grafted.base, rows, batch_size, sampling.options(), lambda _: nullcontext()):
            answers[index] = loaded.decode(ids)
            done()
    return answers


def write_file(
    loaded: Loaded,
    clients: Sequence[str],
    prompts: Sequence[Example],
    sampling: Sampling,
    batch_size: int,
    done: Callable[[], None] = lambda: None,
) -> str:
    """JSON lines of every model's answers, model by model: `model`, `row` (counted from 1), `prompt` and `answer`."""
    lines = []
    for client in clients:
        answers = write_answers(loaded, client, prompts, sampling, batch_size, done)
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
            lines.append({"model": client, "row": number, "prompt": question(prompt), "answer": answer})
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


@torch.no_grad()
def stream_answer(loaded: Loaded, client: str, prompt: Sequence[int], sampling: Sampling, hear: Callable[[str], None]) -> str:
    """One model's answer; `hear` gets each piece of text as soon as it is certain.

    Raises:
        ValueError: as `Loaded.prediction`.
    """
    from transformers import TextStreamer

    class Told(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                hear(text)

    streamer = Told(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = torch.tensor([list(prompt)], device=loaded.grafted.base.device)
    with loaded.using(client) as model, seeds.torch_default(seeds.derive(sampling.seed, "write", client, len(prompt))):
        output = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **sampling.options())
    return loaded.decode(output[0, len(prompt) :].tolist())


class Conversation:
    """What was said to one model, and what it answered."""

    def __init__(self, loaded: Loaded, client: str, system: str = "") -> None:
        """Begin with a system message where there is one."""
        self.loaded, self.client, self.system = loaded, client, system
        self.messages: list[dict[str, str]] = []
        self.forget()

    def say(self, text: str, sampling: Sampling, hear: Callable[[str], None] = lambda piece: None) -> str:
        """The model's answer, which is remembered; the oldest turns are left out once there is no room for them.

        An answer that is stopped half-way by an exception is remembered as far as it was heard.

        Raises:
            ValueError: as `stream_answer`, or the text is empty.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self.loaded.prompt(asked, self.loaded.room(sampling.max_new_tokens))
        pieces: list[str] = []

        def both(piece: str) -> None:
            pieces.append(piece)
            hear(piece)

        try:
            stream_answer(self.loaded, self.client, prompt, sampling, both)
        finally:
            self.messages = [*asked, {"role": "assistant", "content": "".join(pieces).strip()}]
        return self.messages[-1]["content"]

    def forget(self) -> None:
        """Begin anew."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
