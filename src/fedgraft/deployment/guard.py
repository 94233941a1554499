"""Between whoever asks and the site: every request and every encoded response passes here, and the site's log has a line for each.

A request is data: a recipe, names, numbers, leaves. What it names (method, question, dataset) is looked up in the installed package.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fedgraft.bundle import Bundle, Outline
from fedgraft.data.partition import SAFE_NAME, ClientData
from fedgraft.deployment import policy
from fedgraft.deployment.forward import refused
from fedgraft.deployment.place import Place
from fedgraft.deployment.policy import PERSONAL, Refusal
from fedgraft.deployment.site_log import SiteLog, told
from fedgraft.deployment.site_settings import SiteSettings
from fedgraft.engine.wire import ECHOED, Frame
from fedgraft.hosting import Holdings, Host
from fedgraft.methods.method import settled
from fedgraft.recipe import Recipe, check_values
from fedgraft.report.record import read_document, write_document
from fedgraft.tree import Predicate

BOUND = ("method", "lora", "graft", "privacy", "secure_aggregation", "compression")
"""Sections of a recipe that decide which leaves are personal, and how the others are protected; a run keeps them for good."""


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A request whose facts have the types they should have."""

    frame: Frame
    run: str
    recipe: dict[str, Any]
    question: str
    """"" where nothing is asked of the client."""
    client: str
    clients: list[str]
    fingerprint: str
    """The same for a question that is asked again after a lost reply or a coordinator's crash, and for no other."""

    @staticmethod
    def of(request: bytes) -> _Asked:
        frame = Frame.decode(request, "the coordinator's request")
        facts, asking = frame.facts, frame.kind == "ask"
        recipe: Any = facts.get("recipe", {} if frame.kind == "leave" else None)
        clients: Any = facts.get("clients", None if asking else [])
        texts = {name: facts.get(name, "") for name in ("run", "question", "client")}
        numbers = [facts.get(name) for name in ("asked", "committed")] if asking else []
        sections = isinstance(recipe, dict) and all(isinstance(section, dict | int | None) for section in recipe.values())
        named = isinstance(clients, list) and all(isinstance(name, str) for name in [*clients, *texts.values()])
        if frame.kind not in {"join", "ask", "leave"} or not sections or not named or any(type(number) is not int for number in numbers):
            raise ValueError("the request is none that this fedgraft knows; install the version of the coordinator")
        if not SAFE_NAME.fullmatch(texts["run"]):
            raise ValueError(f"the run's id {texts['run']!r} cannot name a folder")
        sums = hashlib.sha256(f"{texts} {facts.get('asked')}\n".encode() + frame.content)
        return _Asked(frame=frame, recipe=recipe, clients=clients, fingerprint=sums.hexdigest(), **texts)

    @property
    def line(self) -> dict[str, Any]:
        """What the log says of it."""
        line: dict[str, Any] = {"run": self.run, "request": self.frame.kind}
        if self.frame.kind == "ask":
            package = Bundle.outline(self.frame.content, "the coordinator's package")
            line |= {"question": self.question, "round": package.facts.get("round"), "fingerprint": self.fingerprint}
        return line


@dataclass(kw_only=True)
class Guard:
    """A site that keeps its policy."""

    settings: SiteSettings
    place: Place
    tell: Callable[[str], None] = lambda line: None
    """Hears one line per event, for people at the site."""
    host: Host = field(init=False)
    log: SiteLog = field(init=False)
    _personal: tuple[object, Predicate] | None = None

    def __post_init__(self) -> None:
        self.host = Host(memories=self.place.memories, model=self.settings.own_model, data=self.settings.own_data, discreet=True)
        self.log = SiteLog(self.place.log)

    def handle(self, request: bytes) -> bytes:
        """The encoded response, or a refusal. A line of the log is on the disk before it is returned; without one nothing leaves."""
        line: dict[str, Any] = {"bytes_in": len(request)}
        try:
            try:
                asked = _Asked.of(request)
                line |= asked.line
                return self._answer(asked, request, line)
            except Refusal as refusal:
                self._write("refused", **line, key=refusal.key, reason=str(refusal))
                return refused(f"refused by the site's policy: {refusal}")
            except ValueError as error:
                self._write("refused", **line, reason=str(error))
                return refused(str(error))
        except OSError as error:
            self.tell(f"nothing is sent, because the log cannot be written: {error}")
            return refused(f"its log cannot be written ({os.strerror(error.errno or errno.EIO)}), and without it nothing leaves")

    def _answer(self, asked: _Asked, request: bytes, line: dict[str, Any]) -> bytes:
        if asked.frame.kind == "leave":
            return self._let_go(self.host.respond(request), Outline(trees={}, facts={}), line)
        self._check_before(asked)
        try:
            holdings = self.host.holdings(asked.frame)
            response = self._load(asked, holdings) or self._ask(asked, request, holdings)
        except Refusal:
            raise
        except (ValueError, OSError) as error:
            response = Frame(kind="refused", facts={"reason": str(error)})
        except Exception as error:
            self._write("failed", **line, reason=f"{type(error).__name__}: {error}")
            raise
        if response.kind in {"refused", "failed"}:
            return self._failed(response, line)
        content = self._check_after(response, asked, holdings)
        return self._let_go(self._as_allowed(response), content, line)

    def _check_before(self, asked: _Asked) -> None:
        """What can be decided by the recipe alone, before a row is read."""
        recipe = check_values(self.host.own(asked.recipe), "the coordinator's recipe")
        policy.check_run(self.settings.policy, recipe.method.name, recipe.build_method(), recipe.federation.rounds, recipe.privacy)
        policy.check_tasks(recipe.evaluation.lm_eval)
        policy.check_masks(self.settings.policy, recipe.secure_aggregation.name != "none")
        if asked.frame.kind == "ask":
            policy.check_question(self.settings.policy, asked.question, asked.fingerprint, self.log.spent(asked.run))
            if asked.client != self.settings.name:
                raise Refusal("name", f"this site is {self.settings.name!r}, not {asked.client!r}")
        complete = recipe.complete()
        self._bind(asked.run, {section: complete.get(section) for section in BOUND})

    def _bind(self, run: str, sections: dict[str, Any]) -> None:
        """A run stays what it was when it began, lest another method should call shared what this one calls personal."""
        path = self.place.run(run) / "bound.json"
        before = read_document(path)
        if not before:
            write_document(path, sections)
        elif changed := [name for name in sections if before.get(name, sections[name]) != sections[name]]:
            raise Refusal(PERSONAL, f"the run began here with other settings of {', '.join(changed)}; start a new run")

    def _load(self, asked: _Asked, holdings: Holdings) -> Frame | None:
        """Load the base model where that has not been done for this run; a response where it cannot be."""
        names = sorted(holdings.clients)
        if names != [self.settings.name]:
            raise ValueError(
                f"the rows make {', '.join(names[:3])}, the site's name is {self.settings.name!r}; rename their file or the site"
            )
        if "base" in vars(holdings):
            return None
        began, name = time.monotonic(), holdings.recipe.model.name
        self.tell(f"loading the base model {name}")
        card = self.host.respond(Frame(kind="join", facts=asked.frame.facts).encode())
        if card.kind != "card":
            return card
        seconds = round(time.monotonic() - began, 1)
        self._write("loaded", run=asked.run, base=name, digest=holdings.base.digest, seconds=seconds)
        return None

    def _ask(self, asked: _Asked, request: bytes, holdings: Holdings) -> Frame:
        """The site's own response, if base and rows are as the policy wants them."""
        rows = rows_behind(asked.question, holdings.clients[self.settings.name], holdings.recipe)
        policy.check_site(self.settings.policy, holdings.base.digest, rows)
        return self.host.respond(request)

    def _check_after(self, response: Frame, asked: _Asked, holdings: Holdings) -> Outline:
        """Whether the response holds nothing that stays here; what it holds."""
        if response.kind == "card":
            return Outline(trees={}, facts=response.facts["card"])
        found = Bundle.outline(response.content, "the reply")
        beside = {name: fact for name, fact in response.facts.items() if name not in ECHOED}
        content = Outline(trees=found.trees, facts={**found.facts, **beside})
        key = (holdings, asked.clients)
        if self._personal is None or self._personal[0] != key:
            method = settled(holdings.method, holdings.base, holdings.recipe.lora, asked.clients)
            self._personal = (key, method.personal)
        policy.check_reply(self.settings.policy, content, self._personal[1])
        return content

    def _as_allowed(self, response: Frame) -> Frame:
        if response.kind != "card" or self.settings.policy.categories:
            return response
        return Frame(kind="card", facts={"card": {**response.facts["card"], "categories": {}}})

    def _let_go(self, response: Frame, content: Outline, line: dict[str, Any]) -> bytes:
        encoded = response.encode()
        policy.check_bytes(self.settings.policy, len(encoded), self.log.spent(line["run"]))
        digest = hashlib.sha256(encoded).hexdigest()
        self._write("answered", **line, bytes=len(encoded), sha256=digest, **told(content))
        return encoded

    def _failed(self, response: Frame, line: dict[str, Any]) -> bytes:
        """Errors of reading rows or files may quote them, so they stay here; that training diverged is no secret."""
        reason = str(response.facts.get("reason", ""))
        self._write("failed", **line, reason=reason)
        if response.kind == "failed" or self.settings.policy.reasons:
            return Frame(kind=response.kind, facts={"reason": reason}).encode()
        return refused("the site could not answer; its own log says why")

    def _write(self, verdict: str, **what: Any) -> None:
        self.log.write(verdict, **what)
        shown = (what.get(key) for key in ("run", "request", "question", "base", "reason") if what.get(key))
        self.tell(f"{verdict}: {', '.join(map(str, shown))}" + (f", {what['bytes']} bytes left" if "bytes" in what else ""))


def rows_behind(question: str, data: ClientData, recipe: Recipe) -> int:
    """Fewest rows that a reply may be made of: a round of one step sees one batch, however many rows the client has."""
    training, evaluation = recipe.training, recipe.evaluation
    if question in {"evaluate", "evaluate_unseen"}:
        adapting = [rows for rows in evaluation.unseen.rows if rows] if question == "evaluate_unseen" else []
        limits = (evaluation.rows, evaluation.generate_rows if evaluation.generate else None, *adapting)
        return min([len(getattr(data, evaluation.split)), *(limit for limit in limits if limit is not None)])
    steps = training.steps if training.least_steps is None else training.least_steps
    return min(len(data.train), steps * training.batch_size) if question in {"train", "finish"} else len(data.train)
