"""A run in memory: load, open, rounds, evaluation; every step can be killed and taken up again.

Order of writes in a round: client memories, then the line of `rounds.jsonl`, then the server's state, whose rename commits the round. On
resume, lines of rounds that were not committed are dropped and clients read the memory version that belongs to the commit. Ctrl-C and
SIGTERM wait for the end of a commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fedgraft import files, origin
from fedgraft.account.memory import workload
from fedgraft.account.take import shared_shapes, summary, take_account
from fedgraft.aggregation import participation
from fedgraft.aggregation.replies import Due, usable
from fedgraft.aggregation.server import Reply
from fedgraft.bundle import Bundle
from fedgraft.coordinating import promise, server_of
from fedgraft.evaluation.gather import due_replies, gather, replies
from fedgraft.evaluation.knowledge import check_tasks
from fedgraft.hosting import training_of
from fedgraft.kept import Kept
from fedgraft.methods.method import settled
from fedgraft.reach import Connect, connecting
from fedgraft.recipe import Recipe
from fedgraft.report.html import leave_page
from fedgraft.report.lines import drop_from, round_line
from fedgraft.report.now import noting
from fedgraft.report.progress import Progress, reply_text
from fedgraft.report.record import Choices, Record, keep_finish
from fedgraft.report.recording import check, recording
from fedgraft.report.results import write_results
from fedgraft.report.spending import Spending
from fedgraft.signals import deferred
from fedgraft.training.client import Report
from fedgraft.transforms.attack import honest
from fedgraft.transforms.compression import restored, summary_lines, widening
from fedgraft.transforms.secure_aggregation.coordinator import SecureRounds
from fedgraft.transforms.secure_aggregation.settings import secure_due
from fedgraft.trouble import Stand, Stopped


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
        self.late, self.told_left = list[str](), set[str]()
        self.kept, self.choices = Kept(folder, recipe.engine.keep_replies), Choices(folder / "selection.json")
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
        self.guarantee = promise(recipe, self.folder, self.reach, self.training.steps)
        work = workload(recipe.training, length=recipe.data.max_length, dtype=recipe.model.dtype)
        self.account = take_account(anatomy, self.method, recipe.lora, recipe.graft, work)
        self.shapes = shared_shapes(anatomy, self.method, recipe.lora, recipe.graft)
        self.due = secure_due(recipe.secure_aggregation, due_replies(self.method, recipe.federation.norm_limit, self.guarantee.due))
        self.engine = self.reach.engine()
        self.progress.step("model")
        asked = recipe.federation.clients_of(len(self.reach.sites))
        self.secure = SecureRounds(recipe.secure_aggregation, recipe.seed, self._heard, self.engine, self)
        sums = self.secure.plan(self.method.merge, asked, self.guarantee.rows, self.guarantee.contribution, self.shapes)
        keeps = self.kept.plan(self.account.bytes_up() * widening(recipe.compression), asked, recipe.federation.rounds)
        self.progress.tell(
            [*summary(self.account), *self.guarantee.lines(), *summary_lines(recipe.compression, self.shapes), *sums, *keeps]
        )
        self.server = server_of(recipe, self.training, self.reach.sites, self.reach.fresh_adapters, self.guarantee.sampling_seed)
        self.method = self.guarantee.protect(self.method)

    def go(self) -> Record:
        """From wherever the run stands to its end."""
        recorders, folder = (self.recipe.record, self.folder, self.recipe.complete()), self.folder
        with noting(self.progress, folder) as self.progress, recording(*recorders, self.progress.warn) as self.tell_recorders:
            return self._go()

    def _go(self) -> Record:
        try:
            self.guarantee.begin()
            if not self.opened:
                self._open()
            if self.server.round < self.recipe.federation.rounds:
                self._begin("training", self.server.expected())
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
        self.kept.drop_from(done)
        drop_from(self.folder / "rounds.jsonl", done)
        return done

    def environment(self) -> dict[str, Any]:
        """What the run ran on, and the digests that a resume compares."""
        return origin.environment(self.recipe.model.name, self.reach.cards(), self.run, self.reach.start())

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
        if self.secure.excuses(reason):
            return
        self.failures[client] = reason
        self.progress.warn(f"{reason}. {after}")
        self.progress.step(f"round {self.server.round + 1}  {client}  {word}")

    def _ask(self, question: str, packages: dict[str, Bundle]) -> Iterator[Reply]:
        """What a method asks by; its replies are kept where the recipe wants it."""
        return self.kept.keeping(question, self.secure.ask(question, packages))

    def _heard(self, question: str, packages: dict[str, Bundle]) -> Iterator[Reply]:
        """Replies in time; each one's facts are for the record, and progress is reported."""
        due, heard = self.due.get(question, Due()), self.engine.ask(question, packages)
        whole = restored(self.recipe.compression, heard, packages, self.lost) if question == "train" else heard
        for reply in usable(whole, packages, due, self.shapes, self.lost):
            if reply.client in self.late:
                self.progress.step(f"round {self.server.round + 1}  {reply.client}  too late")
                continue
            self.replies[reply.client] = dict(reply.bundle.facts)
            note = self.guarantee.note(question, self.server.round)
            self.progress.step(reply_text(self.server.round, reply.client, reply.bundle.facts, note))
            yield reply

    def _open(self) -> None:
        if "side" in self.method.places:
            self._begin("selection", len(self.server.present()))
        self.kept.opening()
        self.method.open(self.method, self.server, self._ask)
        self.choices.keep(self.replies)
        self.kept.opened(self.server.state)
        self._commit()
        self.opened = True

    def _leaving(self) -> list[str]:
        """Clients that have withdrawn, nothing of which is in this round; tells of each once.

        Raises:
            ValueError: all of them have.
        """
        left = sorted(self.engine.left.intersection(self.reach.sites).difference(self.replies))
        for name in left:
            if name not in self.told_left:
                self.told_left.add(name)
                self.progress.warn(f"client {name!r} has left the federation: nothing of it is in round {self.server.round + 1} and after")
        if len(left) == len(self.reach.sites):
            raise ValueError(f"all clients have left the federation. {self.stand.safe()}")
        return left

    def _round(self) -> None:
        self.replies, self.failures, began = {}, {}, time.perf_counter()
        part = self.server.participation(self.server.round)
        self.late = part.late
        self.engine.traffic.down = self.engine.traffic.up = 0
        lr = self.server.round_lr()
        self.kept.round(self.server.round)
        self.method.round(self.method, self.server, self._ask)
        self.kept.merged(self.server.state)
        self.choices.keep(self.replies)
        self.late = []
        if self.failures and not self.replies:
            why = "\n".join(self.failures.values())
            raise ValueError(f"no client could train in round {self.server.round + 1}:\n{why}\n{self.stand.safe()}")
        line = round_line(
            self.server.round,
            lr,
            time.perf_counter() - began,
            self.engine.traffic.facts,
            self.replies,
            simulated=part.facts(self.training.least_steps is not None),
            failures=self.failures,
            left=self._leaving(),
            privacy=self.guarantee.spent(self.server.round + 1, self.server.state.facts),
            unopened=self.secure.unopened,
        )
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
            tokens = sum(facts.get("tokens", 0) for facts in self.replies.values())
            told = {"round": self.server.round, "seconds": round(time.perf_counter() - began, 4), "tokens": tokens}
            keep_finish(self.folder, {**told, **self.engine.traffic.facts})
            self._commit(finalized=self.server.round)

    def _commit(self, **further: Any) -> None:
        facts = {**self.server.state.facts, "round": self.server.round, "asked": self.engine.asked, **further}
        self.server.state = Bundle(trees=self.server.state.trees, facts=facts)
        self.server.state.save(self.folder / "state" / "state.safetensors")
        self.engine.committed = self.engine.asked
        self.spending.energy.look()
        self.stand.at = f"round {self.server.round} of {self.recipe.federation.rounds}"

    def _evaluate(self) -> None:
        """Measure every client's models, then write results and digests."""
        settings, reach = self.recipe.evaluation, self.reach
        who = honest(self.recipe.attack, reach.clients, self.recipe.seed)
        clients, unseen = (who, reach.unseen) if self.guarantee.measured else ([], [])
        self._begin("evaluation", replies(len(clients), len(unseen), settings))
        asked = self.engine.asked
        results = gather(self.method, self.server, self._ask, clients, unseen, settings)
        self.engine.asked = asked  # evaluation leaves no trace in memories, so it can be repeated
        write_results(
            self.folder,
            results | self.guarantee.result(self.server.round, self.server.state.facts),
            state=self.server.state,
            clients={name: store.load(name, asked).digest() for name in reach.sites} if (store := self.engine.store) is not None else {},
            left=self.engine.left.intersection(reach.sites),
            seed=self.recipe.seed,
            resamples=settings.resamples,
        )
        self.tell_recorders()
