"""A job: what a submitting command leaves on the coordinator's disk for the run, which Flower starts in a process of its own.

Flower carries a bundle of files from the command to that process, and to every site. Ours holds no code of a run, only lines that name the
installed fedgraft, and the job's number; recipe and run folder are read from the disk here.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedgraft import __version__
from fedgraft.report.record import read_document, write_document

VARIABLE = "FEDGRAFT_FEDERATION"
"""Environment variable by which the run's process knows the federation's folder."""
NUMBER = re.compile(r"[0-9a-f]{16}")
ORIGIN = "federation.json"
"""In a run folder: which federation it runs on."""
SERVER, CLIENT = "fedgraft.deployment.server:server", "fedgraft.deployment.client:client"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run to be started or continued."""

    federation: Path
    number: str
    out: Path
    recipe: dict[str, Any] | None
    """None continues the run in `out`."""
    rounds: int | None = None
    """Extend the run to so many."""
    nodes: Mapping[int, str] = field(default_factory=dict)
    """Node -> the site that its key was let in for."""

    @property
    def file(self) -> Path:
        """Where it is written down."""
        return self.federation / "jobs" / f"{self.number}.json"

    @property
    def events(self) -> Path:
        """What happens in it (`relay.py`)."""
        return self.file.with_suffix(".jsonl")

    @property
    def log(self) -> Path:
        """Where a bug leaves its traceback."""
        return self.federation / "logs" / f"job-{self.number}.log"

    def save(self) -> None:
        """Write it down."""
        nodes = {str(node): site for node, site in self.nodes.items()}
        write_document(self.file, {"out": str(self.out), "recipe": self.recipe, "rounds": self.rounds, "nodes": nodes})


def new(federation: Path, out: Path, recipe: dict[str, Any] | None, rounds: int | None = None) -> Job:
    """A job with a number of its own."""
    return Job(federation=federation, number=secrets.token_hex(8), out=out.resolve(), recipe=recipe, rounds=rounds)


def load(federation: Path, number: str) -> Job:
    """The job of this number.

    Raises:
        ValueError: there is none.
    """
    file = federation / "jobs" / f"{number}.json"
    if not NUMBER.fullmatch(number) or not file.is_file():
        raise ValueError(f"{number!r}: no such job; start runs with: fedgraft run RECIPE --on {federation}")
    values = read_document(file)
    nodes = {int(node): site for node, site in values["nodes"].items()}
    return Job(federation=federation, number=number, out=Path(values["out"]), recipe=values["recipe"], rounds=values["rounds"], nodes=nodes)


def bundle(server: str = SERVER, client: str = CLIENT) -> dict[str, str]:
    """The files of the Flower app: which installed objects (`module:name`) are its two sides."""
    project = f"""
[project]
name = "fedgraft-run"
version = "{__version__}"
description = "Names the installed fedgraft"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.42,<1.43"]

[tool.flwr.app]
publisher = "fedgraft"
fab-format-version = 1
flwr-version-target = "1.42.0"

[tool.flwr.app.components]
serverapp = "fedgraft_server:app"
clientapp = "fedgraft_client:app"

[tool.flwr.app.config]
job = ""
"""
    shims = {side: _shim(*reference.split(":")) for side, reference in (("server", server), ("client", client))}
    return {"pyproject.toml": project, "LICENSE": "Apache-2.0\n", **{f"fedgraft_{side}.py": text for side, text in shims.items()}}


def _shim(module: str, name: str) -> str:
    return f'from {module} import {name} as app\n\n__all__ = ["app"]\n'


def note_origin(out: Path, federation: Path) -> None:
    """Leave in a run folder which federation it runs on, for `fedgraft resume`."""
    if (out / "recipe.yaml").is_file() and origin(out) != federation:
        write_document(out / ORIGIN, {"federation": str(federation)})


def origin(out: Path) -> Path | None:
    """The federation a run runs on; None of one that ran in a process of its own."""
    found = read_document(out / ORIGIN).get("federation")
    return Path(found) if found else None
