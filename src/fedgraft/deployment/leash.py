"""`python -m fedgraft.deployment.leash MODULE WORDS...`: run a module as a program that ends when whoever started it is gone.

The starter keeps the other end of standard input. However it ends, even by SIGKILL, the system closes that end, and the program takes
its leave with everything it has started.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
from contextlib import suppress

import psutil

GRACE = 10.0  # seconds to end in an orderly way


def main() -> None:
    """Hold on to standard input, then be the module."""
    module = sys.argv[1]
    alone = threading.Event()
    watch = threading.Thread(target=_watch, args=(alone,), name="leash", daemon=True)
    watch.start()
    sys.argv = sys.argv[1:]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        if alone.is_set():  # the program has taken its leave; what it leaves behind is still to be ended
            watch.join()


def _watch(alone: threading.Event) -> None:
    while os.read(0, 1):  # not by way of sys.stdin, whose lock would be held when the program ends by itself
        pass
    alone.set()
    me = psutil.Process()
    started = me.children(recursive=True)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # it would end at once, without a word to what it has started
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
    else:
        me.terminate()
    _, left = psutil.wait_procs(started, timeout=GRACE)
    for process in [*left, me]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main()
