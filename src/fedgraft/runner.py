"""One run from recipe to record: load, open, rounds, evaluation; every step can be killed and resumed.

Order of writes in a round: client memories, then the line of `rounds.jsonl`, then the server's state, whose rename commits the round. On
resume, lines of rounds that were not committed are dropped and clients read the memory version that belongs to the commit.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedgraft import __version__, files
from fedgraft.account.memory import workload
from fedgraft.account.take import summary, take_account
from fedgraft.aggregation.server import Reply, Server
from fedgraft.bundle import Bundle
from fedgraft.data.partition import ClientData, counts, load_clients
from fedgraft.engine.inprocess import InProcess
from fedgraft.evaluation.personal import evaluate_client
from fedgraft.grafts.graft import GraftedModel
from fedgraft.moe.load import load_base
from fedgraft.recipe import Recipe, load_recipe
from fedgraft.report.progress import Progress, Quiet
from fedgraft.report.record import Record, read_document, read_recipe, write_document, write_recipe
from fedgraft.training.client import Client, MemoryStore
from fedgraft.tree import digest_of_digests

LEFTOVER = re.compile(r"\..*\.tmp")  # what a killed write leaves beside its target
PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")


def run(
    recipe: str | Path | dict[str, Any] | Recipe | None = None,
    *,
    out: str | Path | None = None,
    overrides: list[str] | None = None,
    progress: Progress | None = None,
) -> Record:
    """Run a recipe into a new folder.

    Args:
        recipe: YAML file, name of a shipped recipe, dict or `Recipe`; None is the embedded demo.
        out: the run folder, which must not exist or be empty; None makes one under `runs/`.
        overrides: `section.key=value` assignments.
        progress: where to report; None says nothing.

    Raises:
        ValueError: bad recipe, data or model; the message names file, key or client and the remedy.
    """
    checked = load_recipe(recipe, overrides)
    folder = new_folder(out, checked.method.name)
    session = Session(checked.absolute(), folder, progress or Quiet())
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(folder / "recipe.yaml", session.recipe.complete())
    write_document(folder / "environment.json", session.environment())
    return session.go()


def resume(folder: str | Path, *, rounds: int | None = None, progress: Progress | None = None) -> Record:
    """Continue a run where it stopped, or extend a finished one to `rounds`.

    Raises:
        ValueError: no run folder; fewer rounds than are done; the base model or the data are not those the run began with.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"{folder}: not a run folder (it has no recipe.yaml)")
    read_recipe(folder / "recipe.yaml")  # refuses a newer schema
    recipe = load_recipe(folder / "recipe.yaml", [f"federation.rounds={rounds}"] if rounds is not None else None)
    session = Session(recipe, folder, progress or Quiet())
    _same_origin(session)
    done = session.restore()
    if rounds is not None:
        if rounds < done:
            raise ValueError(f"{folder}: {done} rounds are done already; --rounds must not be below that")
        write_recipe(folder / "recipe.yaml", recipe.complete())
    return session.go()


class Stopped(KeyboardInterrupt):
    """Ctrl-C in a run; `folder` can be resumed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder


class Session:
    """A run in memory."""

    def __init__(self, recipe: Recipe, folder: Path, progress: Progress) -> None:
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self.method = recipe.build_method()
        progress.begin("loading", 2)
        self.clients: dict[str, ClientData] = {data.name: data for data in load_clients(recipe.data, recipe.seed)}
        _check_rows(self.clients.values(), recipe.evaluation.split)
        progress.step("data")
        base = load_base(recipe.model)
        work = workload(recipe.training, length=recipe.data.max_length, dtype=recipe.model.dtype)
        self.account = take_account(base, self.method, recipe.lora, recipe.graft, work)  # before adapters are injected
        self.model = GraftedModel(base, recipe.lora, recipe.graft)
        progress.step("model")
        progress.tell(summary(self.account))
        self.engine = InProcess(
            questions={
                "graft": lambda client, package: self.method.graft(self.method, client, package),
                "train": lambda client, package: self.method.train(self.method, client, package),
                "evaluate": lambda client, package: evaluate_client(self.method, client, package, recipe.evaluation),
            },
            open_client=self._open_client,
            store=MemoryStore(folder / "clients"),
        )
        self.server = Server(
            clients=list(self.clients),
            seed=recipe.seed,
            federation=recipe.federation,
            lr=recipe.training.lr,
            lr_min=recipe.training.lr_min,
            fresh_shared=lambda: self.model.fresh_adapters(recipe.seed),
        )
        self.opened = False
        self.replies: dict[str, dict[str, Any]] = {}

    def go(self) -> Record:
        """From wherever the run stands to its end."""
        try:
            if not self.opened:
                self._open()
            left = self.recipe.federation.rounds - self.server.round
            if left > 0:
                self.progress.begin("training", left * len(self.server.sampled()))
            while self.server.round < self.recipe.federation.rounds:
                self._round()
            self._evaluate()
        except KeyboardInterrupt as stop:
            raise Stopped(self.folder) from stop
        finally:
            self.progress.close()
        return Record.load(self.folder)

    def restore(self) -> int:
        """Take up the committed state, drop what was not committed; returns the finished rounds."""
        path = self.folder / "state" / "state.safetensors"
        if not path.exists():
            return 0
        state = Bundle.load(path)
        done, asked = state.facts["round"], state.facts["asked"]
        assert isinstance(done, int)
        assert isinstance(asked, int)
        self.server.state, self.server.round = state, done
        self.engine.asked = self.engine.committed = asked
        self.opened = True
        rounds = self.folder / "rounds.jsonl"
        kept = [line for line in files.read_lines(rounds) if line["round"] < done]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        if rounds.exists() and rounds.read_text(encoding="utf-8") != text:  # also half a line
            files.write_text(rounds, text)
        return done

    def environment(self) -> dict[str, Any]:
        """What the run ran on, and the digests that a resume compares."""
        rows = hashlib.sha256()
        for data in self.clients.values():
            for row in (*data.train, *data.validation, *data.test):
                rows.update(f"{row}\n".encode())
        return {
            "fedgraft": __version__,
            "packages": {name: metadata.version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "device": str(self.model.base.device),
            "command": sys.argv,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "base": self.model.base.name,
            "base_digest": self.model.base.digest,
            "data_digest": rows.hexdigest(),
            "clients": counts(list(self.clients.values())),
        }

    def _open_client(self, name: str) -> Client:
        recipe = self.recipe
        return Client(
            data=self.clients[name],
            model=self.model,
            seed=recipe.seed,
            data_settings=recipe.data,
            training=recipe.training,
            selection=recipe.selection,
        )

    def _ask(self, question: str, packages: dict[str, Bundle]) -> Iterator[Reply]:
        """The engine's ask; keeps each reply's facts for the record and reports progress."""
        for reply in self.engine.ask(question, packages):
            facts = dict(reply.bundle.facts)
            self.replies[reply.client] = facts
            loss = facts.get("loss")
            note = f"round {self.server.round + 1}  {reply.client}  loss {loss:.3f}" if isinstance(loss, float) else reply.client
            if "calibration_tokens" in facts:
                note = f"{reply.client}  {facts['calibration_tokens']:,} calibration tokens (the paper's runs: 262,144)"
            self.progress.step(note)
            yield reply

    def _open(self) -> None:
        if "side" in self.method.places:
            self.progress.begin("selection", len(self.clients))
        self.method.open(self.method, self.server, self._ask)
        if self.replies:
            write_document(self.folder / "selection.json", {"clients": self.replies})
        self._commit()
        self.opened = True

    def _round(self) -> None:
        self.replies, began = {}, time.perf_counter()
        self.engine.traffic.down = self.engine.traffic.up = 0
        lr = self.server.round_lr()
        self.method.round(self.method, self.server, self._ask)
        clients = {
            name: {key: facts[key] for key in ("loss", "tokens", "seconds", "examples", "truncated") if key in facts}
            for name, facts in self.replies.items()
        }
        losses = [facts["loss"] for facts in clients.values() if "loss" in facts]
        line = {
            "round": self.server.round,
            "lr": lr,
            "loss": sum(losses) / len(losses) if losses else None,
            "seconds": round(time.perf_counter() - began, 4),
            "tokens": sum(facts.get("tokens", 0) for facts in clients.values()),
            "bytes_down": self.engine.traffic.down,
            "bytes_up": self.engine.traffic.up,
            "clients": clients,
        }
        files.append_line(self.folder / "rounds.jsonl", line)
        self.server.round += 1
        self._commit()

    def _commit(self) -> None:
        facts = {**self.server.state.facts, "round": self.server.round, "asked": self.engine.asked}
        self.server.state = Bundle(trees=self.server.state.trees, facts=facts)
        self.server.state.save(self.folder / "state" / "state.safetensors")
        self.engine.committed = self.engine.asked

    def _evaluate(self) -> None:
        """Measure every client's models, then write results and digests."""
        self.progress.begin("evaluation", len(self.clients))
        packages = {client: self.method.pack(self.method, self.server, client) for client in self.clients}
        asked = self.engine.asked
        results = {reply.client: reply.bundle.facts["models"] for reply in self._ask("evaluate", packages)}
        self.engine.asked = asked  # evaluation leaves no trace in memories, so it can be repeated
        digests = {name: self.engine.store.load(name, asked).digest() for name in self.clients}
        state = self.server.state.digest()
        write_document(self.folder / "digest.json", {"state": state, "clients": digests})
        files.write_text(self.folder / "digest.txt", digest_of_digests([state, *(digests[name] for name in sorted(digests))]) + "\n")
        split = self.recipe.evaluation.split  # results come last: with them the run is finished
        write_document(self.folder / "results.json", {"rounds": self.server.round, "split": split, "clients": results})


def new_folder(out: str | Path | None, method: str) -> Path:
    """The folder of a new run, not made yet; None is a name of its own under `runs/`.

    Raises:
        ValueError: it is there and holds something.
    """
    folder = Path(out) if out is not None else Path("runs") / f"{method}-{datetime.now(UTC).strftime('%Y%m%d-%H%M%S')}"
    if folder.exists() and (not folder.is_dir() or any(not LEFTOVER.fullmatch(entry.name) for entry in folder.iterdir())):
        raise ValueError(f"{folder}: exists and is never overwritten; choose another --out, or continue it with: fedgraft resume {folder}")
    return folder


def _same_origin(session: Session) -> None:
    """Refuse another base model or other data than the run began with; clear away what killed writes left."""
    folder, now = session.folder, session.environment()
    before = read_document(folder / "environment.json")
    if not before and not (folder / "state").exists():  # killed before it was written
        write_document(folder / "environment.json", now)
        before = now
    for part, name in (("base_digest", "the base model"), ("data_digest", "the data")):
        if before.get(part) != now[part]:
            raise ValueError(f"{folder}: {name} differs from the one this run began with; restore it, or start a new run")
    for path in folder.rglob(".*.tmp"):
        path.unlink()


def _check_rows(clients: Iterable[ClientData], split: str) -> None:
    for data in clients:
        if not getattr(data, split):
            raise ValueError(
                f"client {data.name!r} has no {split} rows to be evaluated on; raise data.{split}_rows or choose another evaluation.split"
            )
