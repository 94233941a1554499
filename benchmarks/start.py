"""How long fedgraft takes to begin: `fedgraft --help`, and the demo up to its first optimiser step.

`start_help` is the wall clock of `fedgraft --help` over that of `python -c pass`, in turns, each in a process of its own.
`start_first_step` are the seconds from the beginning of `fedgraft.run` of the demo recipe to its first optimiser step, less what passes
inside imports and inside the experts' selection: rows and base model read, their digests, the session, packages, and the first forward and
backward. Every turn is a fresh process, and its run ends at that step.
"""

from __future__ import annotations

import argparse
import builtins
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import results


class Clock:
    """Seconds inside the outermost calls of what it wraps."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its seconds counted."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.perf_counter() - start

        return run


class Reached(Exception):
    """The first optimiser step has come."""


def child(overrides: list[str]) -> dict[str, float]:
    """Run the demo to its first optimiser step in this process; seconds by part."""
    imports, selection = Clock(), Clock()
    builtins.__import__ = imports.around(builtins.__import__)
    importlib.import_module = imports.around(importlib.import_module)  # transformers loads its own modules by this
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    import fedgraft

    method: Any = importlib.import_module("fedgraft.methods.method")
    method.select_experts = selection.around(method.select_experts)

    def reached(*_: Any) -> None:
        raise Reached

    register_optimizer_step_pre_hook(reached)
    run = fedgraft.run
    before, start = imports.seconds, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, suppress(Reached):
        run("demo", out=Path(folder) / "run", overrides=overrides)
    whole = time.perf_counter() - start
    inside = imports.seconds - before
    return {"first_step": whole - inside - selection.seconds, "imports": imports.seconds, "selection": selection.seconds}


def seconds_of(command: list[str]) -> float:
    """Wall seconds of a process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measured(repeats: int, overrides: list[str]) -> list[dict[str, Any]]:
    """Entries for `results.json`."""
    plain, helps, steps = [], [], []
    for repeat in range(repeats + 1):
        times = seconds_of([sys.executable, "-c", "pass"]), seconds_of([sys.executable, "-m", "fedgraft", "--help"])
        done = subprocess.run([sys.executable, __file__, "--child", *overrides], check=True, capture_output=True, text=True)
        if repeat:  # the first turn reads files that are not in memory yet
            plain.append(times[0])
            helps.append(times[1])
            steps.append(json.loads(done.stdout.splitlines()[-1]))
    return [
        results.entry(
            "start_help",
            [own / bare for own, bare in zip(helps, plain, strict=True)],
            "times `python -c pass`, wall clock",
            help_seconds=round(statistics.median(helps), 3),
            python_seconds=round(statistics.median(plain), 3),
        ),
        results.entry(
            "start_first_step",
            [step["first_step"] for step in steps],
            "seconds to the first optimiser step, without imports and selection",
            imports_seconds=round(statistics.median(step["imports"] for step in steps), 2),
            selection_seconds=round(statistics.median(step["selection"] for step in steps), 2),
        ),
    ]


def main() -> None:
    """Measure, print, write `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="measured turns after one to warm up")
    parser.add_argument("--small", action="store_true", help="one turn with little selection, nothing written: does every line run?")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="section.key=value of the demo recipe")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.overrides)))
        return
    small = ["selection.tokens=64"] if arguments.small else []
    entries = measured(1 if arguments.small else arguments.repeats, [*small, *arguments.overrides])
    for item in entries:
        print(f"{item['name']:20}{item['ratio']:7.3f} {item['min']:7.3f} {item['max']:7.3f}   {item['figures']}")
    if not arguments.small:
        results.write(entries)


if __name__ == "__main__":
    main()
