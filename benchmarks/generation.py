"""Writing answers for the evaluation against transformers' own batched `generate` on the same prompts of the base model.

transformers' side is the usual way: prompts in the order of the rows, padded on the left by the tokenizer, `generate` with a KV cache. Both
sides stop at the same token and after as many tokens; their answers must be the same. `generation_personal` is a client's personal model
(LoRA on q, k and v, a grafted expert with its gate in every layer) against the same base: what being personal costs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import results
import torch
from plain_loop import holdings_of

from fedgraft.data.batches import prompt_ids
from fedgraft.data.example import Example
from fedgraft.data.templates import end_id
from fedgraft.evaluation.answers import generate
from fedgraft.evaluation.settings import EvaluationSettings
from fedgraft.methods.method import Prediction
from fedgraft.recipe import load_recipe
from fedgraft.report.progress import Quiet
from fedgraft.session import Session
from fedgraft.training.client import Client


@torch.no_grad()
def by_transformers(client: Client, examples: Sequence[Example], settings: EvaluationSettings) -> list[str]:
    """Greedy answers of the base model, as its users would have them written."""
    base, data = client.model.base, client.data_settings
    tokenizer, answers = base.tokenizer, []
    tokenizer.padding_side = "left"
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": settings.max_new_tokens, "pad_token_id": base.pad_id}
    for start in range(0, len(examples), settings.batch_size):
        prompts = [
            prompt_ids(example, tokenizer, data.template, data.max_length) for example in examples[start : start + settings.batch_size]
        ]
        batch = tokenizer.pad({"input_ids": prompts}, padding=True, return_tensors="pt")
        output: Any = base.model.generate(**batch, eos_token_id=end_id(tokenizer, data.template), **options)
        width = batch["input_ids"].shape[1]
        answers += [str(tokenizer.decode(row[width:], skip_special_tokens=True)).strip() for row in output]
    return answers


def timed(write: Callable[[], list[str]]) -> tuple[float, list[str]]:
    """Seconds, and what was written."""
    start = time.perf_counter()
    answers = write()
    return time.perf_counter() - start, answers


def measure(repeats: int, rows: int, tokens: int) -> list[dict[str, Any]]:
    """Entries for `results.json`.

    Raises:
        RuntimeError: the two sides wrote different answers, so that they did not do the same work.
    """
    settings = EvaluationSettings(max_new_tokens=tokens)
    taken: dict[str, list[tuple[float, float]]] = {"generation": [], "generation_personal": []}
    with tempfile.TemporaryDirectory() as folder:
        session = Session(load_recipe("demo", ["model.threads=1", "selection.tokens=512"]), Path(folder), Quiet())
        session._open()
        holdings, store = holdings_of(session), session.engine.store
        for repeat in range(repeats + 1):
            for name in holdings.clients:
                client = holdings.open(name)
                client.memory = store.load(name, session.engine.asked)
                examples = client.data.validation[:rows]
                package = session.method.pack(session.method, session.server, name)
                personal = session.method.answer(session.method, client, package)["personal"]
                theirs, expected = timed(lambda: by_transformers(client, examples, settings))  # noqa: B023
                own, answers = timed(lambda: generate(client, Prediction(tree={}, experts={}), examples, settings))  # noqa: B023
                adapted, _ = timed(lambda: generate(client, personal, examples, settings))  # noqa: B023
                if answers != expected:
                    raise RuntimeError(f"client {name}: the answers differ")
                if repeat:
                    taken["generation"].append((own, theirs))
                    taken["generation_personal"].append((adapted, theirs))
    unit = f"times transformers' batched generate, wall clock; {rows} rows a client, {tokens} new tokens"
    return [
        results.entry(
            name,
            [own / theirs for own, theirs in pairs],
            unit,
            fedgraft_seconds=round(statistics.median(own for own, _ in pairs), 3),
            transformers_seconds=round(statistics.median(theirs for _, theirs in pairs), 3),
        )
        for name, pairs in taken.items()
    ]


def main() -> None:
    """Measure, print, write `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="measured turns of all clients after one to warm up")
    parser.add_argument("--rows", type=int, default=20, help="rows of each client")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    arguments = parser.parse_args()
    entries = measure(arguments.repeats, arguments.rows, arguments.tokens)
    for item in entries:
        print(f"{item['name']:22}{item['ratio']:7.3f} {item['min']:7.3f} {item['max']:7.3f}   {item['figures']}")
    results.write(entries)


if __name__ == "__main__":
    main()
