"""A run in memory: load, open, rounds, evaluation; every step can be killed and taken up again.

Order of writes in a round: client memories, then the line of `rounds.jsonl`, then the server's state, whose rename commits the round. On
resume, lines of rounds that were not committed are dropped and clients read the memory version that belongs to the commit. Ctrl-C and
SIGTERM wait for the end of a commit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from fedgraft import files, origin
from fedgraft.account.memory import workload
from fedgraft.account.take import shared_shapes, summary, take_account
from fedgraft.aggregation import participation
from fedgraft.aggregation.replies import Due, usable
from fedgraft.aggregation.server import Reply, Server
from fedgraft.bundle import Bundle
from fedgraft.evaluation.gather import due_replies, gather, replies
from fedgraft.evaluation.knowledge import check_tasks
from fedgraft.hosting import training_of
from fedgraft.methods.method import settled
from fedgraft.reach import Connect, connecting
from fedgraft.recipe import Recipe
from fedgraft.report.html import leave_page
from fedgraft.report.now import noting
from fedgraft.report.progress import Progress, reply_text
from fedgraft.report.record import CHOICE, Record, keep_finish, read_document, write_document
from fedgraft.report.recording import check, recording
from fedgraft.report.spending import Spending
from fedgraft.report.summary import summarise
from fedgraft.signals import deferred
from fedgraft.training.client import Report
from fedgraft.tree import digest_of_digests
from fedgraft.trouble import Stand


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM (then the cause is `signals.Terminated`) in a run; `folder` can be resumed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder


class Session:
    """A run in memory."""

    def __init__(
        self, recipe: Recipe, folder: Path, progress: Progress, stand: Stand | None = None, connect: Connect | None = None
    ) -> None:
        """Load what the run needs, or wait for its clients.

        Args:
            recipe: the run.
            folder: the run folder, which need not exist yet.
            progress: where to report.
            stand: told where the run stands.
            connect: how clients are reached; None: as `recipe.engine` says.

        Raises:
            ValueError: data, model, method and clients do not fit together, or clients cannot be reached.
        """
        self.recipe, self.folder, self.progress, self.stand = recipe, folder, progress, stand or Stand(folder)
        self.run, self.method, self.spending = origin.run_id(folder), recipe.build_method(), Spending()
        check_tasks(recipe.evaluation, self.method.row_wise)
        check(recipe.record)
        self.opened = False
        self.replies: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}
        self.late: list[str] = []
        self.tell_recorders: Callable[[], None] = lambda: None
        self._begin("loading", 2)
        self.reach = (connect or connecting(recipe.engine))(recipe, folder, self.run, self)
        try:
            self._prepare()
        except BaseException:
            self.reach.close()
            raise

    def _prepare(self) -> None:
        """Everything that can be refused before the first question."""
        recipe = self.recipe
        participation.check(recipe.federation, self.reach.clients, self.method.merge)
        self.training = training_of(recipe, self.method, len(self.reach.clients))
        self.progress.step(f"data; next the base model {recipe.model.name}")
        anatomy = self.reach.anatomy()
        self.method = settled(self.method, anatomy, recipe.lora, sorted([*self.reach.sites, *self.reach.unseen]))
        work = workload(recipe.training, length=recipe.data.max_length, dtype=recipe.model.dtype)
        self.account = take_account(anatomy, self.method, recipe.lora, recipe.graft, work)
        self.due, self.shapes = due_replies(self.method), shared_shapes(anatomy, self.method, recipe.lora, recipe.graft)
        self.engine = self.reach.engine()
        self.progress.step("model")
        self.progress.tell(summary(self.account))
        self.server = Server(
            clients=self.reach.sites,
            seed=recipe.seed,
            federation=recipe.federation,
            lr=recipe.training.lr,
            lr_min=recipe.training.lr_min,
            fresh_shared=self.reach.fresh_adapters,
            steps=lambda number, client: self.training.steps_of(recipe.seed, number, client),
        )

    def go(self) -> Record:
        """From wherever the run stands to its end."""
        with noting(self.progress, self.folder) as self.progress, self._recording() as self.tell_recorders:
            return self._go()

    def _recording(self) -> AbstractContextManager[Callable[[], None]]:
        return recording(self.recipe.record, self.folder, self.recipe.complete(), self.progress.warn)

    def _go(self) -> Record:
        try:
            if not self.opened:
                self._open()
            left = range(self.server.round, self.recipe.federation.rounds)
            if left:
                self._begin("training", sum(len(self.server.participation(number).asked) for number in left))
            while self.server.round < self.recipe.federation.rounds:
                self._round()
            self._finalize()
            self._evaluate()
        except KeyboardInterrupt as stop:
            raise Stopped(self.folder) from stop
        finally:
            self.progress.close()
            self.spending.keep(self.folder, self.account.as_dict())
            leave_page(self.folder)
        return Record.load(self.folder)

    def restore(self) -> int:
        """Take up the committed state, drop what was not committed; returns the finished rounds."""
        path = self.folder / "state" / "state.safetensors"
        if not path.exists():
            return 0
        state = Bundle.load(path)
        done, asked = state.facts.get("round"), state.facts.get("asked")
        if not isinstance(done, int) or not isinstance(asked, int):
            raise ValueError(f"{path}: damaged (it is not the state of a run); restore it from a copy, or start a new run")
        self.server.state, self.server.round = state, done
        self.stand.at = f"round {done} of {self.recipe.federation.rounds}"
        self.engine.asked = self.engine.committed = asked
        self.opened = True
        rounds = self.folder / "rounds.jsonl"
        kept = [line for line in files.read_lines(rounds) if line["round"] < done]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        if rounds.exists() and rounds.read_bytes() != text.encode():  # also half a line
            files.write_text(rounds, text)
        return done

    def environment(self) -> dict[str, Any]:
        """What the run ran on, and the digests that a resume compares."""
        return origin.environment(self.recipe.model.name, self.reach.cards(), self.run)

    def close(self) -> None:
        """Let go of the clients."""
        self.reach.close()

    def hear(self, client: str) -> Report:
        """A client of this process was opened."""
        self.stand.client = client
        title = f"round {self.server.round + 1}  {client}" if self.stand.phase == "training" else client
        return partial(self.progress.part, client, title)

    def failed(self, client: str, reason: str) -> None:
        """A client could not train."""
        self._without(client, reason, "It sits this round out with the memory it had", "stopped")

    def lost(self, client: str, reason: str) -> None:
        """No usable reply came from a client."""
        self._without(client, reason, "It is left out here; its own state is kept on its side", "lost")

    def warn(self, text: str) -> None:
        """Something that the user should know."""
        self.progress.warn(text)

    def _begin(self, phase: str, total: int) -> None:
        self.stand.phase, self.stand.client = phase, ""
        self.spending.begin(phase)
        self.progress.begin(phase, total)

    def _without(self, client: str, reason: str, after: str, word: str) -> None:
        self.failures[client] = reason
        self.progress.warn(f"{reason}. {after}")
        self.progress.step(f"round {self.server.round + 1}  {client}  {word}")

    def _ask(self, question: str, packages: dict[str, Bundle]) -> Iterator[Reply]:
        """The engine's ask; keeps each reply's facts for the record and reports progress."""
        due = self.due.get(question, Due())
        for reply in usable(self.engine.ask(question, packages), packages, due, self.shapes, self.lost):
            if reply.client in self.late:
                self.progress.step(f"round {self.server.round + 1}  {reply.client}  too late")
                continue
            self.replies[reply.client] = dict(reply.bundle.facts)
            self.progress.step(reply_text(self.server.round, reply.client, reply.bundle.facts))
            yield reply

    def _open(self) -> None:
        if "side" in self.method.places:
            self._begin("selection", len(self.server.present()))
        self.method.open(self.method, self.server, self._ask)
        self._keep_choices()
        self._commit()
        self.opened = True

    def _round(self) -> None:
        self.replies, self.failures, began = {}, {}, time.perf_counter()
        part = self.server.participation(self.server.round)
        self.late = part.late
        self.engine.traffic.down = self.engine.traffic.up = 0
        lr = self.server.round_lr()
        self.method.round(self.method, self.server, self._ask)
        self._keep_choices()
        self.late = []
        if self.failures and not self.replies:
            why = "\n".join(self.failures.values())
            raise ValueError(f"no client could train in round {self.server.round + 1}:\n{why}\n{self.stand.safe()}")
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
            **({"simulated": simulated} if (simulated := part.facts(self.training.least_steps is not None)) else {}),
            **({"failed": self.failures} if self.failures else {}),
        }
        with deferred():
            files.append_line(self.folder / "rounds.jsonl", line)
            self.server.round += 1
            self._commit()
        self.tell_recorders()

    def _finalize(self) -> None:
        if self.method.finalize is not None and self.server.state.facts.get("finalized") != self.server.round:
            self._begin("finishing", len(self.reach.sites))
            self.replies, began = {}, time.perf_counter()
            self.engine.traffic.down = self.engine.traffic.up = 0
            self.method.finalize(self.method, self.server, self._ask)
            keep_finish(
                self.folder,
                {
                    "round": self.server.round,
                    "seconds": round(time.perf_counter() - began, 4),
                    "tokens": sum(facts.get("tokens", 0) for facts in self.replies.values()),
                    "bytes_down": self.engine.traffic.down,
                    "bytes_up": self.engine.traffic.up,
                },
            )
            self._commit(finalized=self.server.round)

    def _keep_choices(self) -> None:
        """Add to the record what clients chose that are not in it yet; one that joined late chooses when it first trains."""
        path = self.folder / "selection.json"
        known = read_document(path).get("clients", {})
        told = {name: facts for name, facts in self.replies.items() if facts.get("experts") and name not in known}
        if told:
            chosen = {name: {key: facts[key] for key in CHOICE if key in facts} for name, facts in told.items()}
            write_document(path, {"clients": known | chosen})

    def _commit(self, **further: Any) -> None:
        facts = {**self.server.state.facts, "round": self.server.round, "asked": self.engine.asked, **further}
        self.server.state = Bundle(trees=self.server.state.trees, facts=facts)
        self.server.state.save(self.folder / "state" / "state.safetensors")
        self.engine.committed = self.engine.asked
        self.stand.at = f"round {self.server.round} of {self.recipe.federation.rounds}"

    def _evaluate(self) -> None:
        """Measure every client's models, then write results and digests."""
        settings, reach = self.recipe.evaluation, self.reach
        self._begin("evaluation", replies(len(reach.clients), len(reach.unseen), settings))
        asked = self.engine.asked
        results = gather(self.method, self.server, self._ask, reach.clients, reach.unseen, settings)
        self.engine.asked = asked  # evaluation leaves no trace in memories, so it can be repeated
        store = self.engine.store
        digests = {name: store.load(name, asked).digest() for name in self.reach.sites} if store is not None else {}
        state = self.server.state.digest()
        write_document(self.folder / "digest.json", {"state": state, "clients": digests})
        files.write_text(self.folder / "digest.txt", digest_of_digests([state, *(digests[name] for name in sorted(digests))]) + "\n")
        overall = summarise(results["clients"], self.recipe.seed, settings.resamples)
        results = {"rounds": self.server.round, **results, "summary": overall}
        write_document(self.folder / "results.json", results)  # comes last: with it the run is finished
        self.tell_recorders()
