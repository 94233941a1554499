"""What one would use instead of fedgraft, on the same tiny Mixtral and the same tokens, against a plain loop.

Contestants: `plain` (PyTorch and PEFT), `fedgraft` (a FedAvg run), `trainer` and `trl` (transformers' Trainer and TRL's SFTTrainer, once
for each client and round), `flower` and `nvflare` (their simulations with their own FedAvg). All start from the same adapters and train on
the same batches in the same order, which is checked by their losses. Each runs in processes of its own, all on one core, and they take
turns. What a peer needs beyond the tested versions is installed, pinned, into an environment of its own under `build/peers`.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import results
from peer_turns import BUILD, PACKAGES, SCRIPTS, PeerError, Turn, command, flattened, one_run, python_of, version_of

TOLERANCE, LATER = 1e-4, 5e-3
"""How far a client's loss may be from the plain loop's, relative: in the first two rounds, and later, when a token near a tie may have been
routed otherwise."""


@dataclass
class Race:
    """All contestants and how they did."""

    names: list[str]
    work: Path
    cores: int
    turns: dict[str, list[Turn]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def left(self) -> list[str]:
        """Those that have not failed."""
        return [name for name in self.names if name not in self.failed]

    def turn(self, number: int) -> None:
        """Each runs once, in an order that goes round."""
        order = self.left()
        for name in order[number % len(order) :] + order[: number % len(order)]:
            print(f"turn {number + 1}: {name:9}", end=" ", flush=True)
            try:
                turn = one_run(name, BUILD / "out" / f"{name}-{number}", self.work, self.cores)
            except PeerError as error:
                self._fail(name, str(error))
                continue
            self.turns.setdefault(name, []).append(turn)
            told = f"first step {turn.first_step:6.1f} s, round {statistics.median(turn.rounds):6.2f} s, peak {turn.peak:6,.0f} MiB"
            print(f"{told}, loss {turn.final_loss:.5f}, {turn.seconds:.0f} s in all", flush=True)

    def check_losses(self) -> None:
        """Whoever did other work than the plain loop has failed."""
        expected = self.turns["plain"][0].losses
        for name in self.left():
            for turn in self.turns[name]:
                off = {key: abs(turn.losses.get(key, 0.0) / loss - 1) for key, loss in expected.items()}
                worst = max(off.values())
                if any(value > (TOLERANCE if number < 2 else LATER) for (number, _), value in off.items()) and name not in self.failed:
                    self._fail(name, f"a client's loss is off the plain loop's by {worst:.1e}, so it did other work")

    def _fail(self, name: str, reason: str) -> None:
        self.failed[name] = reason
        print(f"{name} is left out: {reason}", flush=True)


def entries(race: Race, sizes: int) -> list[dict[str, Any]]:
    """Results of those that finished; `sizes` is the computed number of bytes of the adapters to and from all clients."""
    plain, found = race.turns["plain"], []
    for name in race.left():
        turns = race.turns[name]
        ratios = [
            own / other for turn, beside in zip(turns, plain, strict=True) for own, other in zip(turn.rounds, beside.rounds, strict=True)
        ]
        figures: dict[str, Any] = {
            "version": version_of(name),
            "first_step_seconds": round(statistics.median(turn.first_step for turn in turns), 1),
            "round_seconds": round(statistics.median(flattened([turn.rounds for turn in turns])), 3),
            "tokens_per_second": round(statistics.median(flattened([turn.rates for turn in turns]))),
            "peak_MiB": round(statistics.median(turn.peak for turn in turns)),
            "final_loss": round(statistics.median(turn.final_loss for turn in turns), 4),
        }
        if (counted := turns[0].bytes) is not None:
            figures["bytes_per_round"] = round(counted)
        elif name == "nvflare":
            figures["bytes_per_round"] = f"{sizes:,} (computed)"
        if name == "plain" and race.failed:
            figures["left_out"] = "; ".join(f"{peer}: {' '.join(reason.split())}" for peer, reason in race.failed.items()).replace("|", "/")
        found.append(results.entry(f"peer_{name}", ratios, "times the plain loop's seconds a round, wall clock", **figures))
    return found


def installed(names: Sequence[str], race: Race) -> None:
    """Make the environments; who has none is left out."""
    for name in names:
        try:
            python_of(name)
        except (PeerError, OSError) as error:
            race._fail(name, str(error))


def main() -> int:
    """Measure, print, write `results.json`; with --small print alone. 1 if somebody is left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two clients, two rounds, one turn: shows that all run, writes nothing")
    parser.add_argument("--turns", type=int, default=3, help="how often each runs")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of a run, the first of which is not counted")
    parser.add_argument("--cores", type=int, default=1, help="cores that the processes of a contestant share")
    parser.add_argument("--only", nargs="+", choices=list(PACKAGES), default=list(PACKAGES), help="these beside the plain loop")
    arguments = parser.parse_args()
    clients, rounds, turns = (2, 2, 1) if arguments.small else (4, arguments.rounds, arguments.turns)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the contestant in hand is ended too
    work, began = BUILD / "work", time.time()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    race = Race(names=["plain", *(name for name in arguments.only if name != "plain")], work=work, cores=arguments.cores)
    installed(race.names, race)
    command([sys.executable, str(SCRIPTS / "prepare.py"), str(work), str(clients), str(rounds)])
    for number in range(turns):
        race.turn(number)
    if "plain" in race.failed:
        return 1
    race.check_losses()
    found = entries(race, sizes=2 * clients * (work / "leaves.safetensors").stat().st_size)
    for item in found:
        print(f"{item['name']:14} {item['ratio']:.3f} ({item['min']:.3f} to {item['max']:.3f})  {item['figures']}")
    print(f"{time.time() - began:.0f} s in all")
    if not arguments.small:
        results.write(found)
    return 1 if race.failed else 0


if __name__ == "__main__":
    sys.exit(main())
