"""A fedgraft round whose clients train 8 at once, against the plain PyTorch loop over the same batches, client by client.

Both sides do what they do in `plain_loop.py`, whose `sequential` (transformers' own loss) is the plain side; 8 clients, rows of at most 128
tokens. The plain loop trains all 8 clients after each cohort has trained. One more round, of fedgraft alone, shows the floor: the CPU time
of its matrix products without anything else.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import floor
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
    options += [f"federation.rounds={rounds + 2}", *SETTINGS[precision], "lora.dropout=0.0", "selection.tokens=512"]
    options += [f"data.clients={CLIENTS}", "data.partition=dirichlet", f"engine.cohort={size}", f"model.threads={threads}"]
    with tempfile.TemporaryDirectory() as folder:
        session = Session(load_recipe("demo", options), Path(folder), Quiet())
        session._open()
        if (there := len(plain_loop.holdings_of(session).clients)) != CLIENTS:
            raise RuntimeError(f"{there} clients in place of {CLIENTS}")
        loops = {"plain": plain_loop.plain_loop(session, plain_loop.labels_loss, threads=1)}
        plain_loop.one_round(session, loops)
        taken = []
        for _ in range(rounds):
            own, tokens = plain_loop.one_round(session, loops)
            taken.append((own, loops["plain"].clock, tokens))
            print(precision, end=": ")
            plain_loop.show(own, {"plain": loops["plain"].clock}, tokens)
        session.engine.on_send = lambda question, name, content: None
        with floor.Products() as products:
            session._round()
    plain_seconds = statistics.median(plain.wall for _, plain, _ in taken)
    return results.entry(
        NAMES[precision],
        [own.wall / plain.wall for own, plain, _ in taken],
        "times the plain loop, wall clock",
        cpu_ratio=round(statistics.median(own.cpu / plain.cpu for own, plain, _ in taken), 4),
        floor_ratio=round(products.clock.cpu / statistics.median(plain.cpu for _, plain, _ in taken), 4),
        floor_seconds=round(products.clock.cpu, 3),
        floor_gflop=round(products.operations / 1e9, 1),
        fedgraft_seconds=round(statistics.median(own.wall for own, _, _ in taken), 3),
        plain_seconds=round(plain_seconds, 3),
        fedgraft_tokens_per_second=round(statistics.median(tokens / own.wall for own, _, tokens in taken)),
        plain_tokens_per_second=round(statistics.median(tokens / plain.wall for _, plain, tokens in taken)),
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
        figures = " ".join(f"{name} {value}" for name, value in item["figures"].items())
        print(f"{item['name']:16}{item['ratio']:7.3f} {item['min']:7.3f} {item['max']:7.3f}  {figures}")
    results.write(entries)


if __name__ == "__main__":
    main()
