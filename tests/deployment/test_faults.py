"""One federation of real processes, over TLS, on which many runs follow each other: what it learns, and what it survives.

However a site failed, state, figures and memories are in the end those of a run in one process in which the same replies were lost.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file, save_file

from fedgraft import files, origin, runner
from fedgraft.bundle import Bundle
from fedgraft.deployment import forward
from fedgraft.deployment.place import place_of
from fedgraft.reach import Here
from fedgraft.report.record import Record
from tests.deployment.conftest import wait_for
from tests.deployment.places import PATIENCE, SITES, SMALL, Place, Running
from tests.run.world import World

pytestmark = pytest.mark.deploy
GOOD, BAD = SITES
DEADLINE = 20  # seconds; a question takes one or two
ROUNDS, MORE = 4, 6
LONG = {"method": {"name": "flex"}, "federation": {"rounds": ROUNDS}, "training": {"steps": 80, "optimizer_state": "kept"}}


class Federation(Place):
    """Coordinator and sites that stay up from test to test."""

    def __init__(self, folder: Path, world: World) -> None:
        super().__init__(folder, world, *SITES)
        self.rows, self.up = folder / "all", dict[str, Running]()
        self.rows.mkdir()
        for name in SITES:
            shutil.copy(world.data / f"{name}.jsonl", self.rows)
        shutil.copytree(world.model, self.home(BAD) / "model")
        settings = yaml.safe_load(self.settings(BAD).read_text(encoding="utf-8"))
        self.settings(BAD).write_text(yaml.safe_dump(settings | {"model": {"name": "model"}}), encoding="utf-8")

    def home(self, site: str) -> Path:
        return self.folder / site

    def settings(self, site: str) -> Path:
        return self.home(site) / "site.yaml"

    def open(self, *names: str) -> None:
        """Start whichever of these sites is not up."""
        gone = [name for name in names if name not in self.up or self.up[name].process.poll() is not None]
        self.up |= {name: self.site(name) for name in gone}
        for name in gone:
            self.up[name].wait_to_say("ready")

    def recipe(self, **sections: Any) -> dict[str, Any]:
        return self.world.recipe(**{**SMALL, "data": {"path": str(self.rows)}, **sections})

    def far(self, recipe: dict[str, Any], name: str) -> Running:
        """The recipe on the federation, in the folder of this name."""
        engine = {"name": "flower", "clients": len(SITES), "deadline_seconds": DEADLINE}
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe | {"engine": engine}), encoding="utf-8")
        return self.run(file, name)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The rounds of a run so far."""
        return files.read_lines(self.folder / name / "rounds.jsonl")

    def status(self, site: str) -> dict[str, Any]:
        try:
            return forward.status(place_of(self.settings(site)).door)
        except ConnectionError:
            return {}

    def in_mid_round(self, run: str, site: str) -> int:
        """The worker's pid, as soon as a round is behind the run and the site has a question in hand."""
        wait_for(lambda: self.lines(run) and (self.status(site).get("busy") or 0) > 0, PATIENCE)
        return int(self.status(site)["pid"])

    def reason(self, run: str) -> str:
        """Why the bad site was lost, as soon as it was."""
        return wait_for(lambda: next((line["failed"][BAD] for line in self.lines(run) if "failed" in line), None), PATIENCE)


@pytest.fixture(scope="module")
def here(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    place = Federation(tmp_path_factory.mktemp("real"), world)
    with small_disk(place.home(BAD) / "state"):
        place.coordinator()
        place.open(*SITES)
        yield place
        assert place.stop() == []


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of a few MB, where the system lets us; a plain folder elsewhere."""
    folder.mkdir(mode=0o700)
    mounted = os.name == "posix" and not os.getuid()
    words = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "fedgraft-test", str(folder)]
    mounted = mounted and shutil.which("mount") is not None and subprocess.run(words, capture_output=True, check=False).returncode == 0
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def memories(folder: Path) -> dict[str, str]:
    """Digest of each client's newest memory."""
    return {client.name: Bundle.load(max(client.glob("memory-*"))).digest() for client in sorted(folder.iterdir())}


def outcome(here: Federation, name: str) -> tuple[Any, ...]:
    """State, figures and memories of a run on the federation."""
    folder = here.folder / name
    assert not (folder / "clients").exists()
    kept = [place_of(here.settings(site)).memories(origin.run_id(folder)) for site in SITES]
    own = {client: digest for memory in kept for client, digest in memories(memory).items()}
    return json.loads((folder / "digest.json").read_bytes())["state"], Record.load(folder).results, own


def replayed(here: Federation, name: str, recipe: dict[str, Any], out: Path, more: int | None = None) -> tuple[Any, ...]:
    """The same of a run in process that loses the same replies: before training where the site's log knows of no answer, else after it."""
    run = origin.run_id(here.folder / name)
    lost = {(line["round"], client) for line in here.lines(name) for client in line.get("failed", {})}
    answered = {
        (line["round"], site)
        for site in SITES
        for line in files.read_lines(place_of(here.settings(site)).log)
        if (line["verdict"], line.get("run"), line.get("question")) == ("answered", run, "train")
    }

    class Suffering(Here):
        def engine(self) -> Any:
            engine = super().engine()
            ask = engine.ask

            def suffering(question: str, packages: dict[str, Bundle]) -> Any:
                gone = {client for client in packages if question == "train" and (packages[client].facts["round"], client) in lost}
                heard = {
                    client: sent for client, sent in packages.items() if client not in gone or (sent.facts["round"], client) in answered
                }
                yield from (reply for reply in ask(question, heard) if reply.client not in gone)

            engine.ask = suffering
            return engine

    record = runner.run(recipe, out=out, connect=Suffering)
    if more:
        record = runner.resume(out, rounds=more, connect=Suffering)
    return json.loads((out / "digest.json").read_bytes())["state"], record.results, memories(out / "clients")


@pytest.mark.parametrize("case", ["flex", "scaffold", "flora", "fedavg_ft"])
def test_over_tls_a_federation_learns_what_one_process_does(here, tmp_path, case):
    """FLoRA has a round of its own at the client, fedavg_ft an end of its own."""
    recipe = here.recipe(method={"name": case}, training={"steps": 2, "optimizer_state": "kept"})
    here.open(*SITES)
    run = here.far(recipe, case)
    near = replayed(here, case, recipe, tmp_path / "near") if run.ended() == 0 else run.said
    assert outcome(here, case) == near
    assert [line.get("failed") for line in here.lines(case)] == [None, None]


@contextmanager
def kill_site(here, run):
    """Command, worker, node and executor at once; started again when it has been missed."""
    here.in_mid_round(run, BAD)
    for process in [psutil.Process(here.up[BAD].process.pid), *here.up[BAD].family()]:
        process.kill()
    here.up[BAD].ended()
    yield
    here.open(BAD)


@contextmanager
def kill_worker(here, run):
    """The command starts it again."""
    os.kill(here.in_mid_round(run, BAD), signal.SIGKILL)
    yield


@contextmanager
def kill_node(here, run):
    """The command starts it again; the SuperLink takes a minute to see that it was gone, and does not let it in before."""
    here.in_mid_round(run, BAD)
    next(process for process in here.up[BAD].family() if "fedgraft.engine.supernode" in process.cmdline()).kill()
    yield


@contextmanager
def slow_down(here, run):
    """The worker stands still beyond the deadline."""
    worker = here.in_mid_round(run, BAD)
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


@contextmanager
def fill_disk(here, run):
    """Not a byte is free until the site has been missed."""
    folder = here.home(BAD) / "state"
    if not folder.is_mount():
        pytest.skip("needs leave to mount a small disk")
    here.in_mid_round(run, BAD)
    ballast = folder / "ballast"
    try:
        with ballast.open("wb", buffering=0) as sink, suppress(OSError):
            while True:
                sink.write(b"0" * 512)
        yield
    finally:
        ballast.unlink()


GONE = (f"client '{BAD}' did not answer within {DEADLINE} s", "Node Unavailable")
FULL = ("its log cannot be written (No space left on device), and without it nothing leaves", "the site could not answer; its own log says")
FAULTS = {
    "site-killed": (kill_site, GONE),
    "worker-killed": (kill_worker, ("its worker went away in the middle of the question",)),
    "node-killed": (kill_node, GONE),
    "slow": (slow_down, GONE[:1]),
    "disk-full": (fill_disk, FULL),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_site_that_fails_is_named_and_catches_up(here, tmp_path, fault):
    happen, reasons = FAULTS[fault]
    recipe = here.recipe(**LONG)
    here.open(*SITES)
    run = here.far(recipe, fault)
    with happen(here, fault):
        reason = here.reason(fault)
    assert BAD in reason
    assert any(known in reason for known in reasons), reason
    assert run.ended() == 0, run.said
    assert f"warning: {reason}. It is left out here" in run.said
    again = here.start("again", "resume", here.folder / fault, "--rounds", str(MORE))
    assert again.ended() == 0, again.said
    lines = here.lines(fault)
    assert {name for line in lines for name in line.get("failed", {})} == {BAD}
    assert all(GOOD in line["clients"] for line in lines)
    assert [sorted(line["clients"]) for line in lines[ROUNDS:]] == [sorted(SITES)] * (MORE - ROUNDS)
    assert outcome(here, fault) == replayed(here, fault, recipe, tmp_path / "near", MORE)


def test_another_base_model_at_one_site_is_refused_by_name(here):
    here.open(*SITES)
    file = here.home(BAD) / "model" / "model.safetensors"
    sound, weights = file.read_bytes(), load_file(file)
    weights["model.norm.weight"] += 0.01
    try:
        save_file(weights, file, {"format": "pt"})
        run = here.far(here.recipe(), "other-base")
        assert run.ended() == 2
    finally:
        file.write_bytes(sound)
    assert "the clients hold different base models (" in run.said
    assert all(f" at {name}" in run.said for name in SITES)
    assert not (here.folder / "other-base").exists()


def test_altered_replies_are_refused_by_name(here, tmp_path):
    """Truncated, a bit flipped, a leaf missing, on the way from the site's worker to its node, in rounds 1, 2 and 3."""
    here.open(*SITES)
    here.up[BAD].process.send_signal(signal.SIGTERM)
    here.up[BAD].ended()
    liar = here.start("liar", here.settings(BAD), module="tests.deployment.liar")
    liar.wait_to_say("ready")
    recipe = here.recipe(**{**LONG, "federation": {"rounds": 5}})
    run = here.far(recipe, "altered")
    assert run.ended() == 0, run.said
    liar.process.send_signal(signal.SIGTERM)
    liar.ended()
    failed = [line.get("failed", {}).get(BAD, "") for line in here.lines("altered")]
    whose = f"the reply of client '{BAD}'"
    assert [bool(reason) for reason in failed] == [False, True, True, True, False]
    assert failed[1] == f"{whose}: damaged or not written by fedgraft (ValueError: its checksum or length does not fit)"
    assert failed[2].startswith(f"{whose}: damaged or not written by fedgraft (ValueError: its checksum does not fit)")
    assert failed[3] == f"{whose} can't be used: leaf 'layers.0.attention.k.A' of 'shared' is missing"
    assert outcome(here, "altered") == replayed(here, "altered", recipe, tmp_path / "near")
