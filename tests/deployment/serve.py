"""A worker around a stand-in for a site. `echo:TEXT` is answered with TEXT, `wait:PATH` once PATH exists, `fail:` not at all.

`PATH.begun` marks that waiting has begun. Options: `--loopback`, `--grace SECONDS`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from fedgraft.deployment import door
from fedgraft.deployment.worker import Worker


def handle(question: bytes) -> bytes:
    kind, _, text = question.decode().partition(":")
    if kind == "fail":
        raise RuntimeError("row 17 is odd")
    if kind == "wait":
        Path(f"{text}.begun").touch()
        while not Path(text).exists():
            time.sleep(0.01)
    return text.encode()


if __name__ == "__main__":
    folder, options = Path(sys.argv[1]), sys.argv[2:]
    grace = float(options[options.index("--grace") + 1]) if "--grace" in options else 60.0
    worker = Worker(handle=handle, most_bytes=1000, grace=grace, tell=lambda line: print(line, flush=True))
    try:
        with door.opened(folder, loopback="--loopback" in options) as opened:
            worker.serve(opened)
    except ValueError as error:
        sys.exit(str(error))
