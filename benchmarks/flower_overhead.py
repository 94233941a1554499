"""A question to two sites and its answers over real Flower servers, against Flower's own floor; the coordinator's memory with more sites.

One SuperLink and its SuperNodes on loopback, over TLS with node keys. `flower_5MB` and `flower_100MB` take turns within one run: `ask`
sends a package of that size through site guard, worker and codec, and gets as many other bytes back; the floor sends as many in a bare
Flower message to a bare ClientApp in the same process of the site, which returns them with one bit changed, since Flower would not send
the same content again. Memory is that of one FedAvg round with an update of 100 MB from 2, 4 and 8 sites, on servers of its own each: of
the ServerApp, where replies are merged, and of the SuperLink, where they wait. Sites have no model: they answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import results
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid

from fedgraft import files
from fedgraft.aggregation.server import Server
from fedgraft.aggregation.settings import FederationSettings
from fedgraft.bundle import Bundle
from fedgraft.deployment import door, federation, forward, job, keys
from fedgraft.deployment.client import SOCKET
from fedgraft.deployment.connection import load_connection
from fedgraft.deployment.federation import CONNECTION, Federation
from fedgraft.deployment.guard import Guard
from fedgraft.deployment.processes import LOCAL, Parts, free_port
from fedgraft.deployment.relay import Relay
from fedgraft.deployment.site_settings import load_site
from fedgraft.deployment.submission import carry_out
from fedgraft.deployment.worker import Worker
from fedgraft.engine.control import Control
from fedgraft.engine.engine import Traffic
from fedgraft.engine.flower import POLL_GROWTH, POLL_MOST, POLL_SECONDS, GridEngine, client_app
from fedgraft.engine.serverapp import server_app
from fedgraft.engine.wire import ECHOED, Frame
from fedgraft.hosting import Host
from fedgraft.methods import fedavg
from fedgraft.moe.skeleton import skeleton
from fedgraft.recipe import check_values
from fedgraft.report.progress import Quiet
from fedgraft.training.client import unheard

MB = 1_000_000
LEAF = (250, 1000)
"""Entries of a leaf, 1 MB."""
RECIPE: dict[str, Any] = {"method": {"name": "fedavg"}}
POLICY, WORKER = "FEDGRAFT_BENCHMARK_SITE", "--worker"
SIZES = {5: 8, 100: 5}
"""Payload in MB -> how often each contestant has its turn."""
SITES, UPDATE = (2, 4, 8), 100
PATIENCE = 120.0


def payload(megabytes: int, seed: int) -> dict[str, torch.Tensor]:
    """Leaves of that size together; another seed, other bytes."""
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{number}.attention.q.A": torch.randn(LEAF, generator=generator) for number in range(megabytes)}


# A site: the guard of a real one before a host without a model.


class Echo(Host):
    """Answers every question with the leaves of the package, each number doubled."""

    name = ""

    def respond(self, request: bytes, partition: int | None = None) -> Frame:
        """Decode, answer, encode, as a host does around the training."""
        frame = Frame.decode(request)
        if frame.kind == "join":
            card = {
                "name": self.name,
                "rows": {"train": 100, "validation": 10, "test": 10},
                "categories": {},
                "data_digest": "",
                "base_digest": "",
            }
            return Frame(kind="card", facts={"card": card})
        package = Bundle.decode(frame.content)
        shared = {key: 2 * leaf for key, leaf in package.tree("shared").items()}
        reply = Bundle(trees={"shared": shared}, facts={"examples": 100, "loss": 1.0})
        return Frame(kind="reply", facts={name: frame.facts[name] for name in ECHOED}, content=reply.encode())

    def holdings(self, frame: Frame) -> Any:
        """What the guard looks at."""
        return _holdings(self.name)


@cache
def _holdings(name: str) -> Any:
    recipe = check_values(RECIPE, "the benchmark's recipe")
    base = SimpleNamespace(**vars(skeleton(recipe.model)), digest="")
    rows = SimpleNamespace(train=range(100), validation=range(10), test=range(10))
    return SimpleNamespace(clients={name: rows}, base=base, recipe=recipe, method=recipe.build_method())


@cache
def guard(policy: Path) -> Guard:
    """The site of these settings."""
    settings, place = load_site(policy)
    found = Guard(settings=settings, place=place)
    found.host = Echo(memories=place.memories)
    found.host.name = settings.name
    return found


def work(policy: Path) -> None:
    """Be the site's worker."""
    settings, place = load_site(policy)
    door.make_private(place.state)
    with door.opened(place.door) as opened:
        Worker(handle=guard(policy).handle, most_bytes=settings.question_bytes, grace=0.0).serve(opened)


def handle(request: bytes, partition: int | None = None) -> bytes:
    """Through the worker where there is one, else in this process."""
    if SOCKET in os.environ:
        return forward.to_site(socket=Path(os.environ[SOCKET]))(request, partition)
    return guard(Path(os.environ[POLICY])).handle(request)


client = client_app(handle)


@client.query("bare")
def bare(message: Message, context: Context) -> Message:
    """Flower's floor: the same content, but for a bit."""
    data = message.content["body"]["bundle"].data  # type: ignore[union-attr]
    return Message(body(data[:-1] + bytes([data[-1] ^ 1])), reply_to=message)


def body(data: bytes) -> RecordDict:
    """Bytes as Flower moves them fastest."""
    return RecordDict({"body": ArrayRecord({"bundle": Array(dtype="uint8", shape=(len(data),), stype="bytes", data=data)})})


# The coordinator, in the process that Flower starts for it.


class Ear:
    """Whatever goes wrong ends the measurement."""

    def hear(self, client: str) -> Any:
        """Nobody is in this process."""
        return unheard

    def failed(self, client: str, reason: str) -> None:
        """Stop."""
        raise ValueError(reason)

    def lost(self, client: str, reason: str) -> None:
        """Stop."""
        raise ValueError(reason)

    def warn(self, text: str) -> None:
        """Stop."""
        raise ValueError(text)


@dataclass
class Bench:
    """A grid whose sites have introduced themselves."""

    grid: Grid
    engine: GridEngine
    order: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """The sites."""
        return [card.name for card in self.engine.cards]

    def ours(self, leaves: dict[str, torch.Tensor], number: int) -> float:
        """Seconds of a question to all sites."""
        package = Bundle(trees={"shared": leaves}, facts={"round": number, "lr": 1e-3})
        began = time.perf_counter()
        heard = [reply.client for reply in self.engine.ask("train", dict.fromkeys(self.names, package))]
        seconds = time.perf_counter() - began
        assert heard == self.names
        return seconds

    def floor(self, data: bytes) -> float:
        """Seconds of bare messages to all sites, looked for as often."""
        began = time.perf_counter()
        content = body(data)
        messages = [Message(content, node, "query.bare", ttl=600.0) for node in self.engine.names]
        waiting, pause, size = set(self.grid.push_messages(messages)), POLL_SECONDS, 0
        while waiting:
            for message in self.grid.pull_messages(waiting):
                waiting.discard(message.metadata.reply_to_message_id)
                size += len(message.content["body"]["bundle"].data)  # type: ignore[union-attr]
            time.sleep(pause if waiting else 0.0)
            pause = min(pause * POLL_GROWTH, POLL_MOST)
        seconds = time.perf_counter() - began
        assert size == len(data) * len(messages)
        return seconds

    def overhead(self) -> dict[str, Any]:
        """Payload -> seconds of ours and of the floor, turn by turn, after a turn each to warm up."""
        found: dict[str, Any] = {}
        for size, turns in self.order["sizes"].items():
            pairs = []
            for turn in range(turns + 1):
                leaves = payload(int(size), 1000 * int(size) + turn)
                data = b"".join(leaf.numpy().tobytes() for leaf in leaves.values())
                contestants: list[Callable[[], tuple[str, float]]] = [
                    lambda leaves=leaves, turn=turn: ("ours", self.ours(leaves, turn)),  # type: ignore[misc]
                    lambda data=data: ("floor", self.floor(data)),  # type: ignore[misc]
                ]
                pairs.append(dict(contestant() for contestant in (contestants if turn % 2 else contestants[::-1])))
            found[size] = pairs[1:]
        return found

    def memory(self) -> dict[str, Any]:
        """Peak MiB of this process before and after a FedAvg round."""
        method, leaves = fedavg.build(), payload(int(self.order["update"]), 1)
        server = Server(
            clients=self.names, seed=0, federation=FederationSettings(rounds=1), lr=1e-3, lr_min=1e-3, fresh_shared=lambda: leaves
        )
        server.state = Bundle(trees={"shared": leaves})
        before, began = peak(), time.perf_counter()
        method.round(method, server, self.engine.ask)
        seconds = time.perf_counter() - began
        assert all(torch.equal(leaf, 2 * leaves[key]) for key, leaf in server.state.tree("shared").items())
        return {"before": before, "after": peak(), "seconds": seconds}


def peak() -> float:
    """Peak resident memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(grid: Grid, context: Context) -> None:
    """Measure what the job orders and leave it in its folder."""
    order = job.load(Path(os.environ[job.VARIABLE]), str(context.run_config["job"]))
    assert order.recipe is not None
    relay, trouble = Relay(order.events), "the measurement broke down; the SuperLink's log says why"
    try:
        engine = GridEngine(
            grid=grid,
            run="benchmark",
            recipe=RECIPE,
            listener=Ear(),
            wanted=len(order.nodes),
            wait_seconds=PATIENCE,
            deadline_seconds=600.0,
            names=order.nodes,
            traffic=Traffic(),
        )
        engine.introduce()
        figures = getattr(Bench(grid, engine, order.recipe), order.recipe["measure"])()
        files.write_json(order.out / "figures.json", figures)
        trouble = ""
    except ValueError as error:
        trouble = str(error)
        raise
    finally:
        relay.end(trouble)


server = server_app(serve)


# The whole.


@contextmanager
def standing(folder: Path, sites: int, workers: bool) -> Iterator[tuple[Federation, psutil.Process]]:
    """A federation whose coordinator and sites run, and its SuperLink's process."""
    made = federation.create(folder / "fed", ["localhost"], port=free_port(), listen=LOCAL, insecure=False)
    names = [f"site-{number}" for number in range(sites)]
    homes = {name: federation.add_site(made, name) for name in names}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "fedgraft", "coordinator", str(made.folder)]
    with ExitStack() as stack, (folder / "coordinator.log").open("wb") as log:
        coordinator = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log)
        stack.callback(coordinator.wait)
        stack.callback(coordinator.send_signal, signal.SIGTERM)
        _await(lambda: federation.running(made) is not None)
        control = Control(made.local_address, made.certificate)
        _await(lambda: len(control.nodes()) == sites)
        sockets = [_start_site(stack, home, path, workers) for home in homes.values()]
        _await(lambda: all(socket.exists() or not workers for socket in sockets))
        _await(lambda: all(node.status == "online" for node in control.nodes()))
        control.close()
        family = psutil.Process(coordinator.pid).children(recursive=True)
        yield made, next(process for process in family if "fedgraft.deployment.link" in process.cmdline())


def _start_site(stack: ExitStack, home: Path, path: str, workers: bool) -> Path:
    """Start its processes without waiting for any; where the worker's socket will be."""
    policy, connection, port = home / "site.yaml", load_connection(home / CONNECTION), free_port()
    environment = {"PYTHONPATH": path, POLICY: str(policy)}
    _, place = load_site(policy)
    (home / "flower").mkdir()
    parts = stack.enter_context(Parts(home / "logs", home / "flower", environment | ({SOCKET: str(place.door)} if workers else {})))
    if workers:
        parts.start("worker", "flower_overhead", [WORKER, str(policy)])
    secret = home / "executor.secret"
    keys.write_private(secret, secrets.token_bytes(32))
    words = ["--isolation", "process", "--host", LOCAL, "--port", str(port), "--superexec-auth-secret-file", str(secret)]
    parts.start("supernode", "fedgraft.engine.supernode", [*connection.words(), *words])
    words = ["--address", f"{LOCAL}:{port}", "--secret-file", str(secret), "--app", "flower_overhead:client"]
    parts.start("executor", "fedgraft.engine.executor", words)
    return place.door / door.SOCKET


def _await(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not found():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def measured(sites: int, workers: bool, order: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """What a job leaves on a federation of its own, and the peak resident memory of the SuperLink in MiB."""
    with tempfile.TemporaryDirectory() as folder, standing(Path(folder), sites, workers) as (made, link):
        (out := Path(folder) / "out").mkdir()
        app = job.bundle("flower_overhead:server", "flower_overhead:client")
        carry_out(made, job.new(made.folder, out, order), Quiet(), app)
        status = Path(f"/proc/{link.pid}/status").read_text(encoding="ascii")
        most = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        return json.loads((out / "figures.json").read_bytes()), most / 1024


def compare(sizes: dict[int, int]) -> list[dict[str, Any]]:
    """Ours against the floor, with two sites."""
    found, _ = measured(2, True, {"measure": "overhead", "sizes": {str(size): turns for size, turns in sizes.items()}})
    entries = []
    for size, pairs in found.items():
        ratios = [pair["ours"] / pair["floor"] for pair in pairs]
        ours, floor = (sorted(pair[name] for pair in pairs)[len(pairs) // 2] for name in ("ours", "floor"))
        seconds = {"fedgraft_seconds": round(ours, 3), "floor_seconds": round(floor, 3)}
        entries.append(results.entry(f"flower_{size}MB", ratios, "times Flower's floor, wall clock", **seconds, turns=len(pairs)))
    return entries


def remember(numbers: tuple[int, ...], update: int) -> list[dict[str, Any]]:
    """Peak memory of the ServerApp with so many sites, against that with the fewest."""
    entries, first = [], 0.0
    for sites in numbers:
        figures, link = measured(sites, False, {"measure": "memory", "update": update})
        first = first or figures["after"]
        told = {"ServerApp_MiB": round(figures["after"], 1), "before_the_round_MiB": round(figures["before"], 1)}
        told |= {"SuperLink_MiB": round(link, 1), "seconds": round(figures["seconds"], 2)}
        unit = f"times the ServerApp's peak memory with {numbers[0]} sites"
        entries.append(results.entry(f"flower_memory_{sites}", [figures["after"] / first], unit, **told))
        show(entries[-1])
    return entries


def show(entry: dict[str, Any]) -> None:
    """One line."""
    print(
        f"{entry['name']:16} {entry['ratio']:.3f} ({entry['min']:.3f} to {entry['max']:.3f}) {entry['unit']}  {entry['figures']}",
        flush=True,
    )


def main() -> None:
    """Measure, print, write `results.json`; with --small print alone; with --worker be a site's worker."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small payloads and few sites: shows that every line runs, writes nothing")
    parser.add_argument(WORKER, metavar="SITE.YAML", type=Path, help="be a site's worker, for internal use")
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    entries = compare({1: 2, 3: 2} if arguments.small else SIZES)
    for entry in entries:
        show(entry)
    entries += remember((2, 3) if arguments.small else SITES, 2 if arguments.small else UPDATE)
    if not arguments.small:
        results.write(entries)


if __name__ == "__main__":
    main()
