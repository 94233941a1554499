"""Flower's SuperNode, which ends with its connection: by itself it stays, deaf, when the SuperLink no longer knows it."""

from __future__ import annotations

import logging
import os
import sys

from flwr.supernode.cli.flower_supernode import flower_supernode

ENDED = 75  # the exit code: try again later (EX_TEMPFAIL)


def main() -> None:
    """`flower-supernode`."""
    flower_supernode()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ENDED)  # its HTTP thread would keep the process alive


if __name__ == "__main__":
    main()
