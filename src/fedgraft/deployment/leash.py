"""`python -m fedgraft.deployment.leash MODULE WORDS...`: run a module as a program that ends when whoever started it is gone.

The starter keeps the other end of standard input. However it ends, even by SIGKILL, the system closes that end, and the program takes
its leave with everything it has started.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time
from contextlib import suppress

import psutil

GRACE = 10.0  # seconds to end in an orderly way


def main() -> None:
    """Hold on to standard input, then be the module."""
    module = sys.argv[1]
    threading.Thread(target=_watch, name="leash", daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _watch() -> None:
    """Once alone, end what the program has started, then the program: after its own end nothing could be done about the others."""
    while os.read(0, 1):  # not by way of sys.stdin, whose lock would be held when the program ends by itself
        pass
    me = psutil.Process()
    _end(me.children(recursive=True))
    me.terminate()
    time.sleep(GRACE)
    _kill([*me.children(recursive=True), me])


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _kill(psutil.wait_procs(processes, timeout=GRACE)[1])


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main()
