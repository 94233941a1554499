"""A site before whatever a coordinator asks: guard, host and rows are real; the base has no weights, and questions are answered unread."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import yaml

from fedgraft import files, hosting
from fedgraft.bundle import Bundle
from fedgraft.deployment.guard import Guard
from fedgraft.deployment.site_settings import QUESTIONS, load_site
from fedgraft.engine.wire import Frame
from fedgraft.moe.settings import ModelSettings
from fedgraft.moe.skeleton import skeleton
from fedgraft.recipe import load_recipe

NAME, NUMBERS = "north", itertools.count()
LEAF = "layers.0.attention.q.A"
PACKAGE = Bundle(trees={"shared": {LEAF: torch.ones(2, 3)}}, facts={"round": 0, "lr": 1e-3, "heard": None})
ROWS = [{"prompt": "Q", "response": "A", "split": split} for split in ("validation", "test", *["train"] * 5)]


@functools.cache
def guard(place: Path) -> Guard:
    """A site with seven rows and a policy."""
    home = place / "site"
    (home / "rows").mkdir(parents=True)
    files.write_text(home / "rows" / f"{NAME}.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    policy = {"methods": ["flex", "fedavg"], "rounds": 10_000, "reasons": True}
    data = {"dataset": "jsonl", "path": "rows", "partition": "files"}
    values = {"name": NAME, "model": {"name": "demo"}, "data": data, "policy": policy}
    files.write_text(home / "site.yaml", yaml.safe_dump(values))
    settings, found = load_site(home / "site.yaml")
    return Guard(settings=settings, place=found)


@functools.cache
def base() -> Any:
    """Names and shapes of the embedded base."""
    return SimpleNamespace(**vars(skeleton(ModelSettings(name="demo"))), digest="b", notes=[], device="cpu")


def echo(client: Any, package: Bundle) -> Bundle:
    """The leaves as they came."""
    return Bundle(trees={"shared": package.tree("shared")}, facts={"examples": 5})


def guarded(place: Path, content: bytes) -> None:
    """A request with this head (its checksum made to fit) and, after an empty line, this package; what comes back is a frame."""
    head, _, package = content.partition(b"\n\n")
    asked = files.parse_json(head.replace(b"RUN", b"run-%d" % next(NUMBERS)))
    if not isinstance(asked, dict) or not isinstance(asked.get("facts"), dict):
        raise ValueError("no head of a frame")  # which the readers of messages are tried with
    request = Frame(kind=str(asked.get("kind")), facts=asked["facts"], content=package).encode()
    questions = dict.fromkeys(QUESTIONS, echo)
    with (
        patch.object(hosting, "load_base", lambda settings: base()),
        patch.object(hosting, "GraftedModel", lambda *parts: None),
        patch.object(hosting, "site_questions", lambda *parts: dict(questions)),
    ):
        response = Frame.decode(guard(place).handle(request))
    if response.kind in {"refused", "failed"}:
        raise ValueError(response.reason)
    assert response.kind in {"card", "reply", "left"}


def _asking(kind: str, recipe: dict[str, Any], package: Bundle | None = None, **facts: Any) -> bytes:
    head = json.dumps({"kind": kind, "facts": {"run": "RUN", "recipe": recipe, **facts}}).encode()
    return head + b"\n\n" + (b"" if package is None else package.encode())


def requests() -> tuple[bytes, ...]:
    """Of a run with everything at its default, and of one that says little."""
    whole = load_recipe({"method": {"name": "flex"}}).complete()
    few = {"method": {"name": "fedavg"}, "privacy": {"name": "client"}, "compression": {"name": "low_rank"}, "training": {"steps": 1}}
    asked = {"clients": [NAME], "client": NAME, "asked": 0, "committed": 0}
    return (
        _asking("join", whole),
        _asking("join", few),
        _asking("ask", few, PACKAGE, question="train", **asked),
        _asking("ask", {"method": {"name": "flex"}}, PACKAGE, question="evaluate", **{**asked, "clients": [NAME, "south"]}),
        _asking("leave", {}),
    )
