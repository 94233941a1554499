"""The plain loop: one client after another in one process, the adapters' mean in memory."""

from __future__ import annotations

from common import Mean, local_steps, put, taken, work
from marks import Marks


def main() -> None:
    """All rounds."""
    marks, leaves = Marks(), work().leaves()
    for number in range(work().rounds):
        mean = Mean()
        for client in work().clients:
            put(leaves)
            local_steps(client, number, marks)
            mean.add(client, taken())
        leaves = mean.result()
        marks.round_done()


if __name__ == "__main__":
    main()
