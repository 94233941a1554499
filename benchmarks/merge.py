"""Folding one reply into the running weighted mean against copying: bytes a second of each, taking turns in one process.

The fold is all that the coordinator does to a decoded reply: its difference from the state, added to the mean. For each fp32 number of the
reply it reads 4 bytes of it, 4 of the state and 8 of the mean, and writes 8 of the mean, which is held in float64: 24 bytes, the least
that the sum can do. What it moves beyond that counts for nothing. The copy is torch's, of buffers that no cache holds: it reads and
writes 4 bytes for each number.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import pairwise

import results
import torch

from fedgraft.aggregation.merges import Difference, Update, by_examples
from fedgraft.tree import Tree

FOLDED, COPIED = 24, 8  # bytes moved for each fp32 number
WIDE, NARROW, RANK = 4096, 2048, 16


def leaves(megabytes: int, seed: int) -> Tree:
    """LoRA factors [16, 4096] and [2048, 16] in turns, so many MB of fp32 in all."""
    generator, found, left = torch.Generator().manual_seed(seed), dict[str, torch.Tensor](), megabytes * 10**6 // 4
    while left > 0:
        shape = (RANK, WIDE) if len(found) % 2 else (NARROW, RANK)
        found[f"layers.{len(found)}.leaf"] = torch.randn(shape, generator=generator)
        left -= shape[0] * shape[1]
    return found


def fold_seconds(state: Tree, replies: list[Tree]) -> list[float]:
    """Seconds of each fold but the first, which only begins the mean."""
    marks: list[float] = []

    def updates() -> Iterator[Update]:
        for number, reply in enumerate(replies):
            marks.append(time.perf_counter())
            yield Update(client=str(number), delta=Difference(reply, state), examples=number + 1)

    by_examples.run(updates())
    marks.append(time.perf_counter())
    return [after - before for before, after in pairwise(marks[1:])]


def copy_seconds(source: Tree, target: Tree) -> float:
    """Seconds to copy all leaves into buffers that are there."""
    began = time.perf_counter()
    for key, leaf in source.items():
        target[key].copy_(leaf)
    return time.perf_counter() - began


def main() -> None:
    """Measure, print, write `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="of one reply in fp32")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="2 MB, two turns, nothing written: shows that it runs")
    arguments = parser.parse_args()
    megabytes, turns = (2, 2) if arguments.small else (arguments.megabytes, arguments.turns)
    torch.set_num_threads(1)
    state, replies = leaves(megabytes, 0), [leaves(megabytes, 1), leaves(megabytes, 2)]
    target = {key: torch.empty_like(leaf) for key, leaf in state.items()}
    numbers = sum(leaf.numel() for leaf in state.values())
    copy_seconds(state, target)
    fold_seconds(state, replies)
    taken = [(fold_seconds(state, replies)[0], copy_seconds(replies[turn % 2], target)) for turn in range(turns)]
    rates = [(FOLDED * numbers / fold / 1e9, COPIED * numbers / copy / 1e9) for fold, copy in taken]
    entry = results.entry(
        "merge",
        [fold / copy for fold, copy in rates],
        "times the machine's copy bandwidth",
        fold_GB_per_second=round(sorted(fold for fold, _ in rates)[len(rates) // 2], 2),
        copy_GB_per_second=round(sorted(copy for _, copy in rates)[len(rates) // 2], 2),
        reply_MB=megabytes,
        leaves=len(state),
    )
    print(entry["ratio"], entry["figures"], flush=True)
    if not arguments.small:
        results.write([entry])


if __name__ == "__main__":
    main()
