"""`cost.json`: what a run is made of, and what each of its sessions took of the machine. Told by the run, shown by the page."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from fedgraft.report.energy import Energy
from fedgraft.report.record import COST, Record, read_document, write_document

LINUX = Path("/proc/self/status")


class Spending:
    """Seconds by phase, from the first `begin` on, and the peak of memory, of one session of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.energy = Energy()
        self.phase, self.since = "", time.perf_counter()

    def begin(self, phase: str) -> None:
        """A phase starts; what comes until the next one counts for it, also when it had started before."""
        now = time.perf_counter()
        if self.phase:
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now

    def keep(self, folder: Path, account: Mapping[str, Any]) -> None:
        """Add the session to `cost.json`, with the account of the run. For the end of a session, whatever it was: logged, never raised.

        One that found the run finished and evaluated it again is not added: it cost the run nothing, and such a resume changes nothing.
        """
        path = folder / COST
        try:
            self.begin("")
            record, before = Record.load(folder), read_document(path).get("sessions", [])
            reached = {"rounds": len(record.rounds), "finished": record.finished}
            if record.finished and before and reached.items() <= before[-1].items():
                return
            seconds = {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}
            write_document(
                path,
                {
                    "account": account_facts(account),
                    "sessions": [*before, {**reached, "seconds": seconds, **peaks(), **self.energy.facts()}],
                },
            )
        except (Exception, KeyboardInterrupt) as error:
            reason = str(error) or type(error).__name__
            logging.getLogger(__name__).warning("%s was not written (%s); the run itself is not affected", path, reason)


def account_facts(account: Mapping[str, Any]) -> dict[str, Any]:
    """Of an account as `Account.as_dict` tells it what a page shows: entries of leaves, and FLOPs per token of one forward."""
    compute = account["compute"]
    return {
        "parameters": account["parameters"],
        "trained": account["trained"],
        "shared": sum(account["shared"]["places"].values()),
        "personal": sum(account["personal"]["places"].values()),
        "flops_base": compute["base"],
        "flops_grafted": compute["grafted"],
        "flops_adapters": compute["adapters"],
        "flops_graft": compute["graft"],
    }


def peaks() -> dict[str, int]:
    """Greatest memory of this process so far and, where there is one, of the GPU by torch; bytes. What a system does not tell is absent."""
    import torch

    used = {"peak_memory": _peak()}
    if torch.cuda.is_available():
        used["peak_gpu_memory"] = sum(torch.cuda.max_memory_allocated(card) for card in range(torch.cuda.device_count()))
    return {name: value for name, value in used.items() if value}


def _peak() -> int:
    """0 where the system keeps no such figure (macOS tells it only through a module that Windows lacks)."""
    if LINUX.exists():
        line = next((line for line in LINUX.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
        return 1024 * int(line.split()[1])
    return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
