"""What this machine has, and what of it would trouble a run."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from fedgraft import __version__
from fedgraft.account.finding import Finding
from fedgraft.words import size

PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "pydantic", "numpy")
EXTRAS = {
    "flower": "flwr",
    "hub": "datasets",
    "eval": "lm_eval",
    "serve": "fastapi",
    "track": "tensorboard",
    "privacy": "opacus",
    "quant": "torchao",
}
"""Extra -> the package that shows it is installed."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LITTLE_MEMORY, LITTLE_DISK = 2e9, 1e9


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts; sizes in bytes."""

    fedgraft: str
    python: str
    system: str
    packages: dict[str, str]
    extras: dict[str, bool]
    browser: str | None
    cores: int
    """That this process may use."""
    threads: int
    """Of torch."""
    omp_threads: str | None
    """OMP_NUM_THREADS."""
    load: float
    """Processes wanting a core, mean of the last minute."""
    memory_total: int
    memory_free: int
    disk_free: int
    """Where runs/ would be."""
    gpus: list[dict[str, Any]]
    """Name, bytes in all and free."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def look(folder: Path) -> Machine:
    """Look at the machine; `folder` is where runs would be written."""
    memory = psutil.virtual_memory()
    found = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        gpus.append({"name": torch.cuda.get_device_name(number), "memory": total, "free": free})
    return Machine(
        fedgraft=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages={name: version for name in PACKAGES if (version := _version(name))},
        extras={extra: bool(_version(package)) for extra, package in EXTRAS.items()},
        browser=next((path for name in BROWSERS if (path := shutil.which(name))), None),
        cores=cores,
        threads=torch.get_num_threads(),
        omp_threads=os.environ.get("OMP_NUM_THREADS"),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        memory_total=memory.total,
        memory_free=memory.available,
        disk_free=shutil.disk_usage(found).free,
        gpus=gpus,
    )


def troubles(machine: Machine, *, requirements: list[str] | None = None) -> Iterator[Finding]:
    """Problems with their remedies; `requirements` are the package's own unless given."""
    yield from _outdated(machine, requirements if requirements is not None else _requirements())
    if machine.threads > machine.cores:
        yield Finding(
            severity="warning",
            text=f"torch uses {machine.threads} threads on {machine.cores} cores, which can be many times slower",
            remedy=f"set model.threads (small models are fastest with 1) or OMP_NUM_THREADS={machine.cores}",
        )
    if machine.load > machine.cores:
        text = f"other programs keep the {machine.cores} cores busy (load {machine.load:.1f}), so times will be longer than said here"
        yield Finding(severity="note", text=text)
    if machine.memory_free < LITTLE_MEMORY:
        text = f"only {size(machine.memory_free)} of memory are free; the libraries alone take about 0.5 GB"
        yield Finding(severity="warning", text=text, remedy="close other programs")
    if machine.disk_free < LITTLE_DISK:
        text = f"only {size(machine.disk_free)} of disk are free for runs/"
        yield Finding(severity="warning", text=text, remedy="free some, or give another disk with --out")


def _outdated(machine: Machine, requirements: list[str]) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requirements):
        version = machine.packages.get(requirement.name)
        if requirement.marker is None and version and not requirement.specifier.contains(version, prereleases=True):
            yield Finding(
                severity="warning",
                text=f"{requirement.name} {version} is not one that fedgraft supports ({requirement.specifier})",
                remedy=f"pip install '{requirement}'",
            )


def _requirements() -> list[str]:
    try:
        return metadata.requires("fedgraft") or []
    except metadata.PackageNotFoundError:  # run from its source folder
        return []


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
