"""The server with requests of eight clients at once, mixed in one batch, against the same requests one by one.

Both sides ask the same server over HTTP for the same greedy answers, which must be the same. They take turns. `serve_mixed` keeps eight
requests open, one of each client, until all are answered; `serve_queued` hands over all of them at once, as many as fit into a batch of 16.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import results

import fedgraft
from fedgraft.runner import run
from fedgraft.serve.limits import Limits
from fedgraft.serve.server import Server, opened
from fedgraft.serve.service import Service

CLIENTS = 8
QUICK = {"rows": 1, "generate": False, "knowledge_tokens": 0, "experts": False, "resamples": 0}
QUESTIONS = ("Name three uses of a brick.", "What is a mammal?", "Who wrote Hamlet?", "Why is the sky blue?", "Tell me about tea.")


def trained(folder: Path) -> Path:
    """A run of eight clients on the embedded base, leaves a little away from their start."""
    overrides = [f"data.clients={CLIENTS}", "data.partition=dirichlet", "data.train_rows=40", "selection.tokens=512"]
    overrides += ["federation.rounds=1", "training.steps=2", *(f"evaluation.{key}={str(value).lower()}" for key, value in QUICK.items())]
    return run("demo", out=folder / "run", overrides=overrides).folder


def ask(client: httpx.Client, model: str, question: str, tokens: int) -> tuple[str, int]:
    """An answer and its number of tokens."""
    wish = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": tokens}
    found: dict[str, Any] = client.post("/v1/chat/completions", json=wish).json()
    return found["choices"][0]["message"]["content"], found["usage"]["completion_tokens"]


def timed(url: str, asked: list[tuple[str, str]], tokens: int, at_once: int) -> tuple[float, list[tuple[str, int]]]:
    """Seconds for all answers with so many requests open, and the answers."""
    with httpx.Client(base_url=url, timeout=600) as client, ThreadPoolExecutor(at_once) as pool:
        start = time.perf_counter()
        answers = list(pool.map(lambda pair: ask(client, *pair, tokens), asked))
        return time.perf_counter() - start, answers


def measure(url: str, repeats: int, tokens: int) -> list[dict[str, Any]]:
    """Entries for `results.json`.

    Raises:
        RuntimeError: an answer depends on the company it was written in.
    """
    asked = [(f"client-{client:02}", question) for question in QUESTIONS for client in range(CLIENTS)]
    widths = {"serve_mixed": CLIENTS, "serve_queued": len(asked)}
    ratios: dict[str, list[float]] = {name: [] for name in widths}
    rates: dict[str, float] = {}
    for repeat in range(repeats + 1):
        alone, expected = timed(url, asked, tokens, 1)
        written = sum(count for _, count in expected)
        for name, at_once in widths.items():
            taken, answers = timed(url, asked, tokens, at_once)
            if answers != expected:
                raise RuntimeError("the answers differ")
            if repeat:
                ratios[name].append(taken / alone)
                rates[name] = written / taken
        rates["alone"] = written / alone
    unit = f"times one by one, wall clock; {len(asked)} requests of {CLIENTS} clients, at most {tokens} tokens"
    shown = {name: {"tokens_per_second": round(rates[name], 1), "one_by_one": round(rates["alone"], 1)} for name in widths}
    return [results.entry(name, ratios[name], unit, **shown[name]) for name in widths]


def main() -> None:
    """Measure, print, write `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="measured turns after one to warm up")
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--run", type=Path, help="a run of eight clients client-00 to client-07 (default: one is made)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        service = Service(fedgraft.load(arguments.run or trained(Path(folder))), Limits())
        server, sink, ready = Server(service, None), opened("127.0.0.1", 0, keys=False), threading.Event()
        thread = threading.Thread(target=server.run_on, args=(sink, ready.set))
        url = f"http://127.0.0.1:{sink.getsockname()[1]}"
        thread.start()
        ready.wait()
        try:
            entries = measure(url, arguments.repeats, arguments.tokens)
        finally:
            server.should_exit = True
            thread.join()
    for item in entries:
        print(f"{item['name']:22}{item['ratio']:7.3f} {item['min']:7.3f} {item['max']:7.3f}   {item['figures']}")
    results.write(entries)


if __name__ == "__main__":
    main()
