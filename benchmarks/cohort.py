"""A fedgraft round whose clients train 8 at once, against the plain PyTorch loop over the same batches, client by client.

Both sides do what they do in `plain_loop.py`, whose `sequential` (transformers' own loss) is the plain side; 8 clients, rows of at most 128
tokens. The plain loop trains all 8 clients after each cohort has trained.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import plain_loop
import results

from fedgraft.recipe import load_recipe
from fedgraft.report.progress import Quiet
from fedgraft.session import Session

CLIENTS, MAX_LENGTH = 8, 128
NAMES = {"fp32": "cohort8", "bf16": "cohort8_bf16", "autocast": "cohort8_autocast"}
"""`bf16`: the base in bfloat16, the leaves in fp32; `autocast`: all in fp32, computed in bfloat16 where autocast allows it."""
SETTINGS = {"fp32": [], "bf16": ["model.dtype=bfloat16"], "autocast": ["training.precision=bf16"]}


def measure(rounds: int, precision: str, threads: int, size: int = CLIENTS) -> dict[str, Any]:
    """The entry of one precision for `results.json`."""
    options = [f"data.max_length={MAX_LENGTH}", f"training.steps={plain_loop.STEPS}", f"training.batch_size={plain_loop.BATCH_SIZE}"]
    options += [f"federation.rounds={rounds + 1}", *SETTINGS[precision], "lora.dropout=0.0", "selection.tokens=512"]
    options += [f"data.clients={CLIENTS}", f"engine.cohort={size}", f"model.threads={threads}"]
    with tempfile.TemporaryDirectory() as folder:
        session = Session(load_recipe("demo", options), Path(folder), Quiet())
        session._open()
        loops = {"plain": plain_loop.plain_loop(session, plain_loop.labels_loss, threads=1)}
        plain_loop.one_round(session, loops)
        taken = []
        for _ in range(rounds):
            own, tokens = plain_loop.one_round(session, loops)
            taken.append((own.wall, loops["plain"].clock.wall, tokens))
            print(f"{precision}: {tokens} tokens in {own.wall:.2f} s; plain loop {loops['plain'].clock.wall:.2f} s", flush=True)
    return results.entry(
        NAMES[precision],
        [own / plain for own, plain, _ in taken],
        "times the plain loop, wall clock",
        fedgraft_seconds=round(statistics.median(own for own, _, _ in taken), 3),
        plain_seconds=round(statistics.median(plain for _, plain, _ in taken), 3),
        fedgraft_tokens_per_second=round(statistics.median(tokens / own for own, _, tokens in taken)),
        plain_tokens_per_second=round(statistics.median(tokens / plain for _, plain, tokens in taken)),
    )


def main() -> None:
    """Measure both precisions, print, write `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after one to warm up")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads of the cohort; the plain loop has one, which is faster for it"
    )
    parser.add_argument("--precision", choices=list(NAMES), action="append", help="measure these alone")
    arguments = parser.parse_args()
    entries = [measure(arguments.rounds, precision, arguments.threads) for precision in arguments.precision or NAMES]
    for item in entries:
        print(f"{item['name']:16}{item['ratio']:7.3f} {item['min']:7.3f} {item['max']:7.3f}")
    results.write(entries)


if __name__ == "__main__":
    main()
