"""A federation of real processes on loopback, over TLS with node keys, started and stopped by the commands."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import yaml

from fedgraft.deployment.processes import free_port
from tests.deployment.conftest import wait_for
from tests.run.conftest import ENVIRONMENT, ROOT
from tests.run.world import World

SITES = ("garden", "harbour")
PATIENCE = 300  # seconds, for a machine with other things to do
SMALL = {
    "method": {"name": "fedavg"},
    "federation": {"rounds": 2},
    "training": {"steps": 1},
    "evaluation": {"rows": 1, "generate": False, "models": ["personal"]},
}


class Running:
    """A command of fedgraft in a process of its own, with what it said."""

    def __init__(self, log: Path, *words: str | Path, module: str = "fedgraft") -> None:
        self.log = log
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, words)], cwd=ROOT, env=ENVIRONMENT, stdout=sink, stderr=subprocess.STDOUT
            )

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait_to_say(self, words: str) -> None:
        wait_for(lambda: words in self.said or self.process.poll() is not None, PATIENCE)
        assert words in self.said, self.said

    def ended(self) -> int:
        return self.process.wait(timeout=PATIENCE)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


class Place:
    """A federation of the tiny world's clients on this machine."""

    def __init__(self, folder: Path, world: World, *sites: str) -> None:
        self.folder, self.world, self.begun = folder, world, list[Running]()
        self.fed = folder / "fed"
        port, named = str(free_port()), [word for site in sites for word in ("--site", site)]
        assert self.start("init", "federation", "init", self.fed, "--host", "localhost", "--port", port, *named).ended() == 0
        for site in sites:
            self.furnish(site)

    def furnish(self, site: str) -> Path:
        """The bundle, moved to a site that has rows and a model."""
        home = self.folder / site
        shutil.move(self.fed / "bundles" / site, home)
        (home / "rows").mkdir()
        shutil.copy(self.world.data / f"{site}.jsonl", home / "rows")
        settings = yaml.safe_load((home / "site.yaml").read_text(encoding="utf-8"))
        settings["model"]["name"] = str(self.world.model)
        (home / "site.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        return home

    def start(self, log: str, *words: str | Path, module: str = "fedgraft") -> Running:
        self.begun.append(Running(self.folder / f"{log}.log", *words, module=module))
        return self.begun[-1]

    def coordinator(self) -> Running:
        started = self.start("coordinator", "coordinator", self.fed)
        started.wait_to_say("listens on")
        return started

    def site(self, name: str) -> Running:
        return self.start(name, "site", "--policy", self.folder / name / "site.yaml")

    def run(self, recipe: Path, out: str) -> Running:
        return self.start(out, "run", recipe, "--on", self.fed, "--out", self.folder / out)

    def stop(self) -> list[psutil.Process]:
        """End all commands; what they had started and is still there."""
        family = [process for one in self.begun if one.process.poll() is None for process in one.family()]
        for one in self.begun:
            if one.process.poll() is None:
                one.process.send_signal(signal.SIGTERM)
        for one in self.begun:
            one.ended()
        return psutil.wait_procs(family, timeout=10)[1]


def state(folder: Path) -> str:
    return json.loads((folder / "digest.json").read_bytes())["state"]
