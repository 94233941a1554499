"""Peak memory of a run with 200 clients against one with 4; every run is a process of its own.

`memory200` trains 4 clients in each of 2 rounds, `memory200_all` every client in one round. All clients choose experts, grow a graft and
are evaluated. Each has 50 rows of about 1,000 characters in a file of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import results

FEW, MANY = 4, 200
WORDS = (
    "the a river city house green old small people water time year work found under over made long great part place light open and of in"
)
VARIANTS: dict[str, dict[str, Any]] = {
    "memory200": {"federation": {"rounds": 2, "clients_per_round": 4}, "steps": 4},
    "memory200_all": {"federation": {"rounds": 1}, "steps": 1},
}


def write_clients(folder: Path, clients: int) -> None:
    """One file per client: 40 training rows, 5 validation and 5 test rows, a function of the client's number."""
    words = WORDS.split()
    for client in range(clients):
        rng = random.Random(client)
        with (folder / f"client-{client:03}.jsonl").open("w") as sink:
            for number in range(50):
                text = " ".join(rng.choices(words, k=215))
                split = "train" if number < 40 else ("validation" if number < 45 else "test")
                sink.write(json.dumps({"instruction": text[:300], "response": text[300:], "split": split}) + "\n")


def one_run(data: Path, variant: str) -> None:
    """Run in this process and print its peak resident memory in MiB."""
    from fedgraft.runner import run

    recipe = {
        "model": {"threads": 1},
        "data": {"dataset": "jsonl", "partition": "files", "path": str(data), "max_length": 192},
        "lora": {"rank": 8, "alpha": 16, "dropout": 0.0},
        "selection": {"tokens": 192},
        "federation": VARIANTS[variant]["federation"],
        "training": {"steps": VARIANTS[variant]["steps"], "batch_size": 4, "lr": 1e-3},
        "evaluation": {"models": ["personal"], "rows": 1, "generate": False, "knowledge_tokens": 0},
    }
    with tempfile.TemporaryDirectory() as out:
        run(recipe, out=Path(out) / "run")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak(variant: str, clients: int) -> float:
    """Peak resident memory in MiB of a run in a fresh process, with the C library's own allocator settings."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    with tempfile.TemporaryDirectory() as data:
        write_clients(Path(data), clients)
        command = [sys.executable, __file__, "--child", data, variant]
        return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=settings).stdout.split()[-1])


def main() -> None:
    """Measure, print, write `results.json`; with --child, one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, metavar=("DATA", "VARIANT"), help="one run on the clients of a folder, for internal use")
    arguments = parser.parse_args()
    if arguments.child:
        one_run(Path(arguments.child[0]), arguments.child[1])
        return
    for variant in VARIANTS:
        few, many = peak(variant, FEW), peak(variant, MANY)
        print(f"{variant:14} {FEW} clients {few:.0f} MiB, {MANY} clients {many:.0f} MiB, ratio {many / few:.3f}", flush=True)
        unit = f"times the peak memory of {FEW} clients"
        results.write([results.entry(variant, [many / few], unit, few_MiB=round(few, 1), many_MiB=round(many, 1))])


if __name__ == "__main__":
    main()
