"""Whole runs on a tiny model from disk, seen from the wire."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fedgraft.aggregation.server import Reply
from fedgraft.bundle import Bundle
from fedgraft.recipe import load_recipe
from fedgraft.report.progress import Quiet
from fedgraft.report.record import write_recipe
from fedgraft.session import Session
from fedgraft.tree import Tree

ROWS = {"ada": 7, "bo": 12, "cy": 5}
WORDS = {"ada": "blue cat", "bo": "12 + 31 =", "cy": "THE SEA!"}
SECTIONS: dict[str, dict[str, Any]] = {
    "federation": {"rounds": 3},
    "training": {"steps": 2, "batch_size": 2, "lr": 1e-3, "lr_min": 1e-4},
    "evaluation": {"rows": 1, "generate": False, "knowledge_tokens": 0, "models": ["personal"]},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 6, "dropout": 0.1},
    "graft": {},
    "selection": {"tokens": 64},
}


@dataclass(frozen=True)
class Place:
    """A model folder and a folder with one file per client."""

    model: Path
    data: Path

    def recipe(
        self, method: str, clients: tuple[str, ...] = tuple(ROWS), options: dict[str, Any] | None = None, **sections: Any
    ) -> dict[str, Any]:
        """A small recipe of a method with its options and the adapter sections it uses; further sections are merged over it."""
        used = load_recipe({"method": {"name": method, **(options or {})}}).build_method().sections
        values: dict[str, Any] = {
            "model": {"name": str(self.model)},
            "data": {"dataset": "jsonl", "path": str(self.clients(clients)), "partition": "files"},
            "method": {"name": method, **(options or {})},
            **{name: section for name, section in ADAPTERS.items() if name in used},
            **SECTIONS,
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
        return values

    def clients(self, names: tuple[str, ...]) -> Path:
        """A folder with the files of these clients."""
        folder = self.data / "-".join(names)
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            rows = [
                {"instruction": f"{WORDS[name]} {number}", "output": WORDS[name][::-1] * (1 + number % 2), "split": split}
                for number, split in enumerate(["validation", "test", *["train"] * ROWS[name]])
            ]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return folder


@dataclass
class Run:
    """A session with every package and reply as bytes, in order."""

    session: Session
    down: list[tuple[str, str, bytes]] = field(default_factory=list)
    up: list[tuple[str, str, bytes]] = field(default_factory=list)

    @property
    def state(self) -> Tree:
        """The shared leaves."""
        return self.session.server.state.tree("shared")

    @property
    def sites(self) -> list[str]:
        """Who trains: the clients, or the one site of a method that pools their rows."""
        return self.session.server.clients

    @property
    def digest(self) -> str:
        """The run's digest."""
        return (self.session.folder / "digest.txt").read_text()

    def memory(self, client: str) -> Bundle:
        """A client's newest memory."""
        return self.session.engine.store.load(client, self.session.engine.asked)

    def go(self) -> Run:
        """The whole run."""
        write_recipe(self.session.folder / "recipe.yaml", self.session.recipe.complete())
        self.session.go()
        return self


def open_run(recipe: dict[str, Any], folder: Path, lost: Callable[[str, int, str], bool] | None = None) -> Run:
    """A session that is watched on the wire; `lost(question, round, client)` tells which replies never arrive."""
    run = Run(Session(load_recipe(recipe), folder, Quiet()))
    engine = run.session.engine
    engine.on_send = lambda question, client, content: run.up.append((question, client, content))
    engine.site.questions = {question: _watched(run, question, answer) for question, answer in engine.site.questions.items()}
    ask = engine.ask

    def lossy(question: str, packages: dict[str, Bundle]) -> Iterator[Reply]:
        for reply in ask(question, packages):
            if lost is None or not lost(question, run.session.server.round, reply.client):
                yield reply

    engine.ask = lossy  # type: ignore[method-assign]
    return run


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Place:
    """Model and tokenizer as a folder that `model.name` can point to."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return Place(model=folder / "model", data=folder / "data")


def _watched(run: Run, question: str, answer: Callable[[Any, Bundle], Bundle]) -> Callable[[Any, Bundle], Bundle]:
    def watched(client: Any, package: Bundle) -> Bundle:
        run.down.append((question, client.name, package.encode()))
        return answer(client, package)

    return watched
