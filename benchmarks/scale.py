"""Whole runs of 40, 400 and 4,000 clients against one of 4, each in a process of its own: memory, time, start-up, files.

Every client has 10 rows of some 60 characters in a file of its own, chooses experts on 32 tokens, trains one step of one row in one round
and is evaluated on one row.
"""

from __future__ import annotations

import argparse
from typing import Any

import results
from many_clients import Plan, add_child, apart, be_child, whole_run

FEW, MANY, MOST = 4, (40, 400), 4_000
PLAN = Plan(rows=10, letters=60, tokens=32, batch_size=1, experts=False)


def entry_of(clients: int, few: dict[str, float], many: dict[str, float]) -> dict[str, Any]:
    """Memory as the ratio; time without the start, and files without those that a run has anyway, for each client."""
    more = clients - FEW
    return results.entry(
        f"scale_{clients}",
        [many["peak_MiB"] / few["peak_MiB"]],
        f"times the peak memory of {FEW} clients",
        peak_MiB=round(many["peak_MiB"], 1),
        seconds=round(many["seconds"], 1),
        seconds_a_client=round((many["seconds"] - many["start_seconds"]) / clients, 4),
        start_seconds=round(many["start_seconds"], 2),
        start_seconds_with_4=round(few["start_seconds"], 2),
        files_a_client=round((many["files"] - few["files"]) / more, 2),
        kB_a_client=round((many["MiB"] - few["MiB"]) * 2**20 / more / 1e3, 1),
    )


def main() -> None:
    """Measure, print, write `results.json`; with --child, one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", action="store_true", help=f"{MOST} clients too: a quarter of an hour on an idle core")
    parser.add_argument("--small", action="store_true", help="8 clients, nothing written: shows that it runs")
    add_child(parser)
    arguments = parser.parse_args()
    if arguments.child:
        be_child(arguments.child, {"run": whole_run})
        return
    few = apart("run", FEW, PLAN)
    for clients in (8,) if arguments.small else (*MANY, *([MOST] if arguments.most else [])):
        entry = entry_of(clients, few, apart("run", clients, PLAN))
        print(entry["name"], entry["ratio"], entry["figures"], flush=True)
        if not arguments.small:
            results.write([entry])


if __name__ == "__main__":
    main()
