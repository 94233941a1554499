"""`python -m tests.fuzz.long [--times SHARE] [READER ...]`: damaged inputs, as many as `READERS` says, and what came of them."""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import shutil
import sys
import time
import traceback

from tests.fuzz.readers import READERS, damaged, folder


def tried(name: str, count: int, seed: int) -> str | None:
    """A line of the report; None after an error that is no refusal, which is shown with the input that made it."""
    reader, rng = READERS[name], random.Random(f"{seed} {name}")
    for sound in reader.seeds:  # what is made once is made before the clock starts
        with contextlib.suppress(ValueError, OSError):
            reader.read(sound)
    read, slowest, began = 0, 0.0, time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        content, since = damaged(rng, reader.seeds), time.perf_counter()
        try:
            reader.read(content)
            read += 1
        except (ValueError, OSError):
            pass
        except BaseException:
            print(f"{name}: {content[:2000]!r}\n{traceback.format_exc(limit=-8)}", file=sys.stderr)
            return None
        slowest = max(slowest, time.perf_counter() - since)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    seconds = time.perf_counter() - began
    return f"| {name} | {count:,} | {read:,} | {slowest:.2f} s | {grown:.0f} MB | {seconds:.0f} s |"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", metavar="READER", help="names; all without any")
    parser.add_argument("--times", type=float, default=1.0, metavar="SHARE", help="of the inputs of each reader")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| reader | inputs | of which read | slowest | memory grew by | all |\n|---|---|---|---|---|---|")
    failed = 0
    for name in options.readers or READERS:
        line = tried(name, max(1, int(READERS[name].many * options.times)), options.seed)
        failed += line is None
        if line:
            print(line, flush=True)
    shutil.rmtree(folder(), ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
