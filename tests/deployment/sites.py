"""A site of the tiny world, and a run that reaches it through any function from request to response."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedgraft.aggregation.server import Reply
from fedgraft.bundle import Bundle
from fedgraft.engine.engine import Listener, Traffic
from fedgraft.engine.wire import Frame
from fedgraft.reach import Here
from fedgraft.recipe import Recipe
from tests.run.world import World

NAME = "garden"
SMALL = {
    "training": {"steps": 1},
    "evaluation": {"rows": 1, "generate": False, "models": ["trained", "personal"]},
    "selection": {"tokens": 128},
}
Handle = Callable[[bytes, int | None], bytes]


def site(folder: Path, world: World, **settings: Any) -> Path:
    """A site's settings file, with rows of its own beside it."""
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    shutil.copy(world.data / f"{NAME}.jsonl", folder / "rows")
    values = {
        "name": NAME,
        "model": {"name": str(world.model)},
        "data": {"dataset": "jsonl", "path": "rows", "partition": "files"},
        **settings,
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "site.yaml"


def recipe(world: World, rows: Path, **sections: Any) -> dict[str, Any]:
    """A run of that client alone."""
    small = {name: {**values, **sections.get(name, {})} for name, values in SMALL.items()}
    values = world.recipe(**{**sections, **small})
    values["data"]["path"] = str(rows)
    return values


@dataclass
class Asking:
    """An engine over one handle; `before` hears the number of each question."""

    recipe: Recipe
    run: str
    clients: list[str]
    handle: Handle
    listener: Listener
    before: Callable[[int], None]
    asked: int = 0
    committed: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    store: None = None
    left: frozenset[str] = frozenset()

    def ask(self, question: str, packages: dict[str, Bundle]) -> Iterator[Reply]:
        self.before(self.asked)
        version, self.asked = self.asked, self.asked + 1
        for name, package in packages.items():
            facts = {"run": self.run, "recipe": self.recipe.complete(), "clients": self.clients, "asked": version}
            facts |= {"question": question, "client": name, "committed": self.committed}
            response = Frame.decode(self.handle(Frame(kind="ask", facts=facts, content=package.encode()).encode(), None))
            if response.kind == "reply":
                yield Reply(client=name, bundle=Bundle.decode(response.content))
            else:
                self.listener.lost(name, str(response.facts["reason"]))

    def close(self) -> None:
        pass


def over(handle: Handle, before: Callable[[int], None] = lambda number: None) -> Callable[..., Here]:
    """A `Connect` over a handle. Only anatomy, names and first adapters come from this process."""

    class Away(Here):
        def __init__(self, recipe: Recipe, folder: Path, run: str, listener: Listener) -> None:
            super().__init__(recipe, folder, run, listener)
            self.asking = Asking(recipe, run, self.clients, handle, listener, before)

        def engine(self) -> Any:
            return self.asking

    return Away


def outcome(folder: Path) -> dict[str, Any]:
    """What a run leaves with its coordinator, without the seconds."""
    state = Bundle.load(folder / "state" / "state.safetensors")
    return {"state": state.digest(), "facts": state.facts, "results": (folder / "results.json").read_bytes()}


def memories(folder: Path) -> dict[str, bytes]:
    """A client's own files."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("memory-*"))}
