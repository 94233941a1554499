"""A training step with `privacy.name: examples` against one without, client by client in one process.

FedAvg on the embedded base, the demo's clients. With privacy a step draws its rows, takes the gradient of each by itself, clips it, and
noises the sum; without, it is one forward and backward over the batch. Both step with the same optimiser on batches tokenised beforehand,
and take turns after every client. Rows of a step are drawn independently, so that they are the batch size only on average.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import plain_loop
import results

from fedgraft.recipe import load_recipe
from fedgraft.report.progress import Quiet
from fedgraft.session import Session
from fedgraft.training.client import Client
from fedgraft.transforms.example_privacy import Rows
from fedgraft.transforms.noise import seeded
from fedgraft.transforms.privacy import ExamplePrivacy
from fedgraft.tree import Tree

MAX_LENGTH, LR = 256, 1e-3


def a_round(client: Client, shared: Tree, rows: Rows | None, number: int) -> tuple[float, int]:
    """(seconds, rows) of a client's steps of a round, by rows or in batches."""
    client.by_rows = rows
    batches = client.batches(number)
    began = time.perf_counter()
    client.fit(shared, round_number=number, lr=LR, steps=batches)
    return time.perf_counter() - began, sum(len(part.ids) for step in batches for part in step)


def measure(rounds: int, steps: int, batch_size: int) -> dict[str, Any]:
    """The entry for `results.json`; a ratio for each round after one to warm up."""
    options = ["method.name=fedavg", "graft=null", "evaluation.models=[personal]", f"data.max_length={MAX_LENGTH}", "model.threads=1"]
    options += [f"training.steps={steps}", f"training.batch_size={batch_size}"]
    settings, taken = ExamplePrivacy(clip=1.0, noise_multiplier=1.0), []
    with tempfile.TemporaryDirectory() as folder:
        session = Session(load_recipe("demo", options), Path(folder), Quiet())
        holdings, shared = plain_loop.holdings_of(session), session.server.fresh_shared()
        for number in range(rounds + 1):
            spent, drawn = {True: 0.0, False: 0.0}, {True: 0, False: 0}
            for name in holdings.clients:
                rows = Rows(settings=settings, noise=seeded(number, name))
                for private in (number % 2 == 0, number % 2 != 0):
                    seconds, count = a_round(holdings.open(name), shared, rows if private else None, number)
                    spent[private] += seconds
                    drawn[private] += count
            print(f"{drawn[True]} rows one by one in {spent[True]:.2f} s; {drawn[False]} in batches in {spent[False]:.2f} s", flush=True)
            taken.append((spent[True], spent[False], drawn[True]))
    taken, all_steps = taken[1:], steps * len(holdings.clients)
    return results.entry(
        "dp_sgd",
        [private / plain for private, plain, _ in taken],
        "times a step without privacy, wall clock",
        private_milliseconds=round(1000 * statistics.median(private for private, _, _ in taken) / all_steps, 1),
        plain_milliseconds=round(1000 * statistics.median(plain for _, plain, _ in taken) / all_steps, 1),
        private_rows_per_step=round(statistics.mean(rows for _, _, rows in taken) / all_steps, 2),
        plain_rows_per_step=batch_size,
    )


def main() -> None:
    """Measure, print, write `results.json`; with --small nothing is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="measured rounds after one to warm up")
    parser.add_argument("--steps", type=int, default=8, help="steps of each client in a round")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step, on average")
    parser.add_argument("--small", action="store_true", help="one round of two steps of two rows, to see that every line runs")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.rounds, arguments.steps, arguments.batch_size = 1, 2, 2
    entry = measure(arguments.rounds, arguments.steps, arguments.batch_size)
    print(f"{entry['name']:16}{entry['ratio']:7.3f} {entry['min']:7.3f} {entry['max']:7.3f}")
    if not arguments.small:
        results.write([entry])


if __name__ == "__main__":
    main()
