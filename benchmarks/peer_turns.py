"""One run of one contestant of `peers.py`: its environment, its processes, their memory, and what it noted."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

SCRIPTS = Path(__file__).with_name("peers")
BUILD = Path(__file__).parents[1] / "build" / "peers"
PACKAGES = {
    "plain": "torch",
    "fedgraft": "fedgraft",
    "trainer": "transformers",
    "trl": "trl",
    "flower": "flwr",
    "nvflare": "nvflare",
}
"""Contestant -> the package whose version is told."""
PATIENCE, PAUSE = 400.0, 0.5
"""Seconds a contestant may take; seconds between two looks at its memory."""
QUIET = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


class PeerError(Exception):
    """A contestant cannot be measured; the text says why."""


@dataclass
class Turn:
    """One run of one contestant."""

    marks: list[dict[str, Any]]
    started: float
    seconds: float
    peak: float
    """MiB, the proportional set sizes of all its processes."""
    tokens: list[int]
    """Of each round."""

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Marks of one kind, in time."""
        return sorted((mark for mark in self.marks if mark["event"] == kind), key=lambda mark: mark["at"])

    @property
    def first_step(self) -> float:
        """Seconds from the start of its process."""
        return float(self.events("step")[0]["at"] - self.started)

    @property
    def rounds(self) -> list[float]:
        """Seconds of each round after the first."""
        ends = [mark["at"] for mark in self.events("round")]
        return [after - before for before, after in pairwise(ends)]

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each round after the first."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens[1:], self.rounds, strict=True)]

    @property
    def losses(self) -> dict[tuple[int, str], float]:
        """(round, client) -> mean training loss of its steps."""
        return {(mark["round"], mark["client"]): mark["loss"] for mark in self.events("client")}

    @property
    def final_loss(self) -> float:
        """Mean over the clients in the last round."""
        last = len(self.tokens) - 1
        return statistics.fmean(loss for (number, _), loss in self.losses.items() if number == last)

    @property
    def bytes(self) -> float | None:
        """What travels in a round, both ways, where the contestant counts it."""
        sizes = [mark["bytes"] for mark in self.events("round") if "bytes" in mark]
        return statistics.median(sizes) if sizes else None


def python_of(name: str) -> Path:
    """The interpreter of a contestant: this one unless it needs packages of its own.

    Raises:
        PeerError: they cannot be installed.
    """
    pins = SCRIPTS / f"{name}.txt"
    if not pins.exists():
        return Path(sys.executable)
    folder, tested = BUILD / "env" / name, sysconfig.get_path("purelib")
    python, ready = folder / "bin" / "python", folder / "installed.txt"
    wanted = f"{tested}\n{pins.read_text(encoding='utf-8')}"
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making {folder} with {', '.join(pins.read_text(encoding='utf-8').split())}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    command([sys.executable, "-m", "venv", str(folder)])
    site = Path(command([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    (site / "tested.pth").write_text(f"{tested}\n", encoding="utf-8")  # torch and the rest as they are, after its own packages
    pip = ["-m", "pip", "--disable-pip-version-check", "install", "-qq", "--no-deps", "--no-cache-dir", "-r", str(pins)]
    command([str(python), *pip])  # without dependencies: all are pinned, and none can bring another torch
    ready.write_text(wanted, encoding="utf-8")
    return python


def command(words: Sequence[str]) -> str:
    """The output of a program.

    Raises:
        PeerError: it failed; with the last line of what it said.
    """
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(f"{' '.join([Path(words[0]).name, *words[1:3]])} failed: {last_line(done.stderr or done.stdout)}")
    return done.stdout


def last_line(text: str) -> str:
    """Its last line, where programs say what went wrong."""
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def one_run(name: str, out: Path, work: Path, cores: int) -> Turn:
    """Run a contestant in a fresh process.

    Raises:
        PeerError: it failed, took too long, or did not do all rounds.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="peers-", ignore_cleanup_errors=True) as scratch, (out / "log.txt").open("wb") as log:
        places = dict.fromkeys(("TMPDIR", "RAY_TMPDIR", "FLWR_HOME", "HF_HOME"), scratch)
        path = os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH", "")]))
        own = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}  # as users start them
        settings = own | QUIET | places | {"PYTHONPATH": path, "PEERS_WORK": str(work), "PEERS_OUT": str(out)}
        words = [str(python_of(name)), str(SCRIPTS / f"run_{name}.py")]
        started = time.time()
        process = psutil.Popen(words, env=settings, cwd=out, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        if hasattr(process, "cpu_affinity"):
            process.cpu_affinity(process.cpu_affinity()[:cores])
        peak, ended = watch(process, started)
    if process.returncode != 0:
        said = last_line((out / "log.txt").read_text(encoding="utf-8", errors="replace"))
        raise PeerError(
            f"ended with {process.returncode} after {ended - started:.0f} s: {said} (build/peers/out/{out.name}/log.txt has the rest)"
        )
    file = out / "marks.jsonl"
    marks = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    tokens = tokens_of(work)
    turn = Turn(marks=marks, started=started, seconds=ended - started, peak=peak, tokens=tokens)
    if len(turn.events("round")) != len(tokens) or not turn.events("step"):
        raise PeerError(f"did {len(turn.events('round'))} of {len(tokens)} rounds; build/peers/out/{out.name}/log.txt says why")
    return turn


def watch(process: psutil.Popen, started: float) -> tuple[float, float]:
    """Wait for the end; the largest memory seen, in MiB, and the moment of the end. What a contestant leaves running is ended."""
    family: dict[int, psutil.Process] = {process.pid: process}
    peak = 0.0
    try:
        while process.poll() is None and time.time() < started + PATIENCE:
            try:
                family |= {child.pid: child for child in process.children(recursive=True)}
            except psutil.NoSuchProcess:
                break
            peak = max(peak, sum(memory(member) for member in family.values()))
            time.sleep(PAUSE)
        ended = time.time()
    finally:
        for member in family.values():
            if member.is_running():  # compares the time of creation, so never another process of the same number
                member.kill()
        process.wait()
    return peak, ended


def memory(process: psutil.Process) -> float:
    """Proportional set size in MiB, so that pages which processes share count once; 0 when it has gone."""
    try:
        return float(process.memory_full_info().pss) / 2**20
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return 0.0


def tokens_of(work: Path) -> list[int]:
    """Tokens of each round, of all clients together."""
    rows = json.loads((work / "work.json").read_text(encoding="utf-8"))["rows"].values()
    return [sum(len(row["input_ids"]) for step in steps for row in step) for steps in map(flattened, zip(*rows, strict=True))]


def flattened(clients: Sequence[Sequence[Any]]) -> list[Any]:
    """The steps of all clients."""
    return [step for steps in clients for step in steps]


def version_of(name: str) -> str:
    """Package and version."""
    package = PACKAGES[name]
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return f"{package} {command([str(python_of(name)), '-c', code]).strip()}"
