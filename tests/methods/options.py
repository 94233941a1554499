"""Runs of methods with options of their own, as a recipe's `method` section gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedgraft.bundle import Bundle
from fedgraft.methods.method import Prediction
from tests.methods.harness import Place, Run, open_run


def with_options(place: Place, method: str, options: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """The harness's recipe of a method with its options."""
    return place.recipe(method, **sections) | {"method": {"name": method, **options}}


def begin(place: Place, folder: Path, method: str, options: dict[str, Any], **sections: Any) -> Run:
    """A run of it, opened and not begun."""
    return open_run(with_options(place, method, options, **sections), folder / method)


def answers(run: Run, name: str) -> dict[str, Prediction]:
    """A client's models as the evaluation gets them."""
    client, method = run.session.reach.holdings.open(name), run.session.method
    client.memory = run.memory(name)
    return method.answer(method, client, method.pack(method, run.session.server, name))


def sent_addresses(run: Run) -> set[str]:
    """Every address that crossed the wire, in either direction."""
    bundles = [Bundle.decode(content) for _, _, content in run.up + run.down]
    return {key for bundle in bundles for tree in bundle.trees.values() for key in tree}
