"""What `memory.py` and `scale.py` share: files of many clients, and a run on them in a process of its own, measured from inside.

All clients choose experts, grow a graft and are evaluated on one row.
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
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedgraft.report.progress import Quiet

WORDS = (
    "the a river city house green old small people water time year work found under over made long great part place light open and of in"
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the clients of a measured run have and do."""

    rows: int = 50
    """Of each client; 8 of 10 to train on."""
    letters: int = 1_000
    """Of each row, about."""
    tokens: int = 192
    """Longest row, and calibration text."""
    steps: int = 1
    batch_size: int = 4
    rounds: int = 1
    asked: int | None = None
    """Clients a round; None: all."""
    experts: bool = True
    """Whether routing and gates are measured."""


Figures: TypeAlias = Mapping[str, float]
Contestant: TypeAlias = Callable[[Path, Plan], Figures]
"""Runs on a folder of clients' files and tells what it took."""


def write_clients(folder: Path, clients: int, plan: Plan) -> None:
    """One file per client, a function of the client's number: 8 of 10 rows to train on, one to validate, one to test."""
    words = WORDS.split()
    for client in range(clients):
        rng = random.Random(client)
        with (folder / f"client-{client:04}.jsonl").open("w") as sink:
            for number in range(plan.rows):
                text = " ".join(rng.choices(words, k=plan.letters // 4))[: plan.letters]
                split = {8: "validation", 9: "test"}.get(number % 10, "train")
                row = {"instruction": text[: plan.letters // 3], "response": text[plan.letters // 3 :], "split": split}
                sink.write(json.dumps(row) + "\n")


class FirstQuestion(Quiet):
    """Notes when the run asks its clients for the first time."""

    at: float | None = None

    def begin(self, phase: str, total: int) -> None:
        """A phase of `total` steps starts."""
        if phase == "selection":
            self.at = self.at or time.perf_counter()


def recipe_of(data: Path, plan: Plan) -> dict[str, Any]:
    """The recipe of a measured run: FLEx on the embedded base."""
    return {
        "model": {"threads": 1},
        "data": {"dataset": "jsonl", "partition": "files", "path": str(data), "max_length": plan.tokens},
        "lora": {"rank": 8, "alpha": 16, "dropout": 0.0},
        "selection": {"tokens": plan.tokens},
        "federation": {"rounds": plan.rounds, "clients_per_round": plan.asked},
        "training": {"steps": plan.steps, "batch_size": plan.batch_size, "lr": 1e-3},
        "evaluation": {"models": ["personal"], "rows": 1, "generate": False, "knowledge_tokens": 0, "experts": plan.experts},
    }


def whole_run(data: Path, plan: Plan) -> Figures:
    """A run as `fedgraft run` does it: `peak_MiB`, `seconds`, `start_seconds` of them before the first question, `files` and `MiB` left."""
    from fedgraft.runner import run

    first, began = FirstQuestion(), time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        run(recipe_of(data, plan), out=Path(out) / "run", progress=first)
        seconds = time.perf_counter() - began
        assert first.at is not None
        left = [path.stat().st_size for path in (Path(out) / "run").rglob("*") if path.is_file()]
    return {"peak_MiB": peak(), "seconds": seconds, "start_seconds": first.at - began, "files": len(left), "MiB": sum(left) / 2**20}


def peak() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def add_child(parser: argparse.ArgumentParser) -> None:
    """The option by which a script is its own child."""
    parser.add_argument("--child", nargs=3, metavar=("WHO", "DATA", "PLAN"), help="one contestant on the clients of a folder; internal")


def be_child(child: tuple[str, str, str], contestants: Mapping[str, Contestant]) -> None:
    """Print what a contestant took."""
    who, data, plan = child
    print(json.dumps(contestants[who](Path(data), Plan(**json.loads(plan)))))


def apart(who: str, clients: int, plan: Plan) -> dict[str, float]:
    """What a contestant takes on the clients of a plan, in a fresh process with the C library's own allocator settings."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    with tempfile.TemporaryDirectory() as data:
        write_clients(Path(data), clients, plan)
        command = [sys.executable, sys.argv[0], "--child", who, data, json.dumps(asdict(plan))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=settings)
        return dict(json.loads(done.stdout.splitlines()[-1]))
