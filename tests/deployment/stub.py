"""A process to be started.

`listen PORT`, `fail TEXT`, `family FILE` (a child too, pids in FILE), `stubborn FILE` (ignoring SIGTERM),
`orderly FILE` (which exits on SIGTERM by itself, its child ignores it).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    kind, word = sys.argv[1:]
    if kind == "fail":
        print(word)
        sys.exit(3)
    if kind == "listen":
        listener = socket.create_server(("127.0.0.1", int(word)))
    else:
        if kind in {"stubborn", "orderly"}:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # inherited by the child
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        if kind == "orderly":
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
        Path(word).write_text(f"{os.getpid()} {child.pid}", encoding="utf-8")
    time.sleep(600)
