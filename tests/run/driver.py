"""A process that has everything imported and forks a child per run, so that killing a real process costs no start-up.

Reads one JSON job per line: {recipe, out} or {folder, rounds}, and either `kill_after` (seconds), `crash_at` (number of a change on disk)
or neither.
Answers one JSON line: {status (negative: the signal), seconds, writes (the changes, in order), error}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedgraft import files, runner


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runner.run(json.loads(sys.stdin.readline()), out=Path(folder) / "warm")  # loads what is loaded late
    for line in sys.stdin:
        print(json.dumps(trial(json.loads(line))), flush=True)


def trial(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job in a child and see how it ends."""
    source, sink = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(source)
        _child(job, sink)
    os.close(sink)
    if job.get("kill_after") is not None:
        time.sleep(job["kill_after"])
        os.kill(child, signal.SIGKILL)  # a child that has ended is still there until it is waited for
    with os.fdopen(source) as told:
        text = told.read()
    _, code = os.waitpid(child, 0)
    told_lines = [json.loads(line) for line in text.splitlines()]
    return {
        "status": os.waitstatus_to_exitcode(code),
        "seconds": time.monotonic() - began,
        "writes": [line["write"] for line in told_lines if "write" in line],
        "error": next((line["error"] for line in told_lines if "error" in line), ""),
    }


def _child(job: dict[str, Any], sink: int) -> None:
    def tell(**what: str) -> None:
        os.write(sink, (json.dumps(what) + "\n").encode())

    try:
        _watch_writes(tell, job.get("crash_at"))
        if "recipe" in job:
            runner.run(job["recipe"], out=job["out"])
        else:
            runner.resume(job["folder"], rounds=job.get("rounds"))
    except BaseException as error:
        tell(error=f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def _watch_writes(tell: Any, crash_at: int | None) -> None:
    """Number every moment just before the disk changes for good (so also just after the change before), tell it, die at the wanted one.

    Nothing is flushed to the disk itself: what a killed process wrote, the kernel keeps.
    """
    count = 0
    replace, unlink, append = os.replace, os.unlink, files.append_line

    def moment(name: str, before: Callable[[], object] = lambda: None) -> None:
        nonlocal count
        count += 1
        if count == crash_at:
            before()
            os.kill(os.getpid(), signal.SIGKILL)
        tell(write=name)

    def watched_replace(old: Any, new: Any) -> None:
        moment(f"the rename to {Path(new).name}")
        replace(old, new)

    def watched_unlink(path: Any, **options: Any) -> None:
        if os.path.lexists(path):
            moment(f"the removal of {Path(path).name}")
        unlink(path, **options)

    def watched_append(path: Path, value: Any) -> None:
        moment(f"a line of {path.name}")
        whole = path.stat().st_size if path.exists() else 0
        append(path, value)
        moment(f"the second half of a line of {path.name}", lambda: os.truncate(path, (whole + path.stat().st_size) // 2))

    os.replace, os.unlink, files.append_line = watched_replace, watched_unlink, watched_append
    os.fsync = lambda handle: None


if __name__ == "__main__":
    main()
