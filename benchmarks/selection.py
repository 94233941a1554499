"""The calibration pass of expert selection against plain matrix products of the experts' shapes, in turns in one process.

The work of the pass is counted by matrix: every expert on every token, and what else a forward needs: attention with its scores, shared
experts, routers. Chosen experts count once, although the pass runs them a second time where it cannot keep what they gave, and so do
padding and everything that is no matrix product: nothing. `selection` is that work a second over the rate of the products alone, so 1 is
out of reach; `selection_experts` is the work of all experts over the seconds that the pass takes longer than a forward without experts.
Seconds are CPU time of the process, which other work on the machine changes little; give `--clock wall` for the wall's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import results
import torch
import torch.nn.functional as F

from fedgraft.account.memory import workload
from fedgraft.account.take import take_account
from fedgraft.data.batches import Batch
from fedgraft.hosting import Holdings
from fedgraft.moe.load import Base
from fedgraft.recipe import load_recipe
from fedgraft.selection.profile import measure
from fedgraft.training.client import Client

CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}


def products(base: Base, tokens: int, rows: int) -> tuple[Callable[[], None], int]:
    """A loop of the experts' own matrix products on `tokens` tokens of every layer, `rows` at a time, and its FLOPs."""
    experts = [[base.family.expert(site, number) for number in range(site.num_experts)] for site in base.sites]
    width, inputs = base.sites[0].width, base.sites[0].inputs_width
    dtype = base.model.dtype
    parts = [
        (torch.randn(min(rows, tokens - at), inputs, dtype=dtype), torch.randn(min(rows, tokens - at), width, dtype=dtype))
        for at in range(0, tokens, rows)
    ]

    def run() -> None:
        for layer in experts:
            for x, hidden in parts:
                for expert in layer:
                    expert.project(x)
                    F.linear(hidden, expert.down)

    weights = sum(weight.numel() for layer in experts for expert in layer for weight in expert.projections().values())
    return run, 2 * tokens * weights


@contextmanager
def without_experts(base: Base) -> Iterator[None]:
    """Forwards inside the block leave the routed experts out."""
    for site in base.sites:
        site.experts.forward = lambda hidden, index, weight: torch.zeros_like(hidden)
    try:
        yield
    finally:
        for site in base.sites:
            del site.experts.forward


@torch.no_grad()
def forwards(base: Base, batches: Sequence[Batch]) -> None:
    """A forward of every batch, without head and routed experts."""
    with without_experts(base):
        for batch in batches:
            base.model.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)


def work_beside_experts(client: Client, holdings: Holdings, batches: Sequence[Batch]) -> int:
    """FLOPs of one forward of these rows without head and routed experts, by the account."""
    base, recipe = client.model.base, holdings.recipe
    work = workload(recipe.training, length=recipe.data.max_length, dtype=recipe.model.dtype)
    compute = take_account(base, holdings.method, recipe.lora, recipe.graft, work).compute
    lengths: list[int] = [int(length) for batch in batches for length in batch.mask.sum(1)]
    scores = compute.scores / recipe.data.max_length / 2  # a token's, for each token of its row: on average it looks at half of them
    return round(sum(length * (compute.shared + compute.other + scores * length) for length in lengths))


def measured(repeats: int, tokens: int, rows: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Entries for `results.json`."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("demo", ["model.threads=1", f"selection.tokens={tokens}"])
        holdings = Holdings(recipe, Path(folder))
        client = holdings.open(sorted(holdings.clients)[0])
        base, batches = client.model.base, list(client.calibration())
    tokens = sum(batch.tokens for batch in batches)
    loop, experts = products(base, tokens, rows)
    beside = work_beside_experts(client, holdings, batches)
    contestants: dict[str, Callable[[], Any]] = {
        "products": loop,
        "pass": lambda: measure(base, batches, tokens),
        "beside": lambda: forwards(base, batches),
    }
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 1):
        for name, run in contestants.items():
            start = clock()
            run()
            if repeat:
                taken[name].append(clock() - start)
    return entries(taken, experts, beside, tokens)


def entries(taken: dict[str, list[float]], experts: int, beside: int, tokens: int) -> list[dict[str, Any]]:
    """The two shares."""
    turns = list(zip(taken["products"], taken["pass"], taken["beside"], strict=True))
    whole = [(experts + beside) / whole * products / experts for products, whole, _ in turns]
    alone = [products / (whole - rest) for products, whole, rest in turns]
    figures = {
        "tokens": tokens,
        "experts_gflop": round(experts / 1e9, 1),
        "beside_gflop": round(beside / 1e9, 1),
        "pass_seconds": round(statistics.median(taken["pass"]), 3),
        "forward_without_experts_seconds": round(statistics.median(taken["beside"]), 3),
        "products_gflop_a_second": round(experts / statistics.median(taken["products"]) / 1e9, 1),
    }
    return [
        results.entry("selection", whole, "of the rate of the experts' matrix products alone; all of the pass", **figures),
        results.entry("selection_experts", alone, "of the same rate; the experts' part of the pass", **figures),
    ]


def main() -> None:
    """Measure, print, write `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="measured turns after one to warm up")
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens")
    parser.add_argument("--rows", type=int, default=1024, help="rows of each matrix product")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="CPU time of the process, or the wall's")
    parser.add_argument("--small", action="store_true", help="300 tokens, two turns, nothing written: does every line run?")
    arguments = parser.parse_args()
    repeats, tokens = (2, 300) if arguments.small else (arguments.repeats, arguments.tokens)
    found = measured(repeats, tokens, arguments.rows, CLOCKS[arguments.clock])
    for item in found:
        print(f"{item['name']:20}{item['ratio']:7.3f} {item['min']:7.3f} {item['max']:7.3f}   {item['figures']}")
    if not arguments.small:
        results.write(found)


if __name__ == "__main__":
    main()
