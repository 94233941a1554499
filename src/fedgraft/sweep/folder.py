"""The folder of a sweep: a run folder per point, `recipes/`, `logs/`, and `sweep.json`, which names the points and is never shortened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedgraft.recipe import load_recipe
from fedgraft.report.record import SWEEP, Record, read_document, write_document, write_recipe
from fedgraft.sweep.plan import Point


def enter(folder: Path, points: Sequence[Point]) -> None:
    """Note new points in `sweep.json` and write the recipes of all that have not begun; nothing is deleted.

    Raises:
        ValueError: the folder is no sweep's but holds something, or a point that has begun had another recipe.
    """
    if folder.exists() and not (folder / SWEEP).exists() and any(entry.name not in {".lock"} for entry in folder.iterdir()):
        raise ValueError(f"{folder}: exists and is no sweep (it has no {SWEEP}); choose another --out")
    known = {entry["name"]: entry for entry in entries(folder)}
    for point in points:
        before, now = known.get(point.name), point.recipe.complete()
        if before is not None and state(folder, point.name) != "new" and _differs(before["recipe"], now):
            raise ValueError(f"{folder / point.name}: has begun with another recipe than {point.name!r} has now; choose another --out")
    for point in points:
        if state(folder, point.name) == "new":
            write_recipe(recipe_file(folder, point.name), point.recipe.complete())
            known[point.name] = {"name": point.name, "settings": point.settings, "recipe": point.recipe.complete(), "failure": ""}
    _write(folder, list(known.values()))


def entries(folder: Path) -> list[dict[str, Any]]:
    """The points of a sweep by `sweep.json`: name, settings, recipe, failure ("" unless its last start failed); [] without one."""
    return list(read_document(folder / SWEEP).get("points", []))


def note(folder: Path, name: str, failure: str) -> None:
    """Keep how the last start of a point ended."""
    _write(folder, [{**entry, "failure": failure} if entry["name"] == name else entry for entry in entries(folder)])


def state(folder: Path, name: str) -> str:
    """`new`, `begun` or `finished`."""
    if not (folder / name / "recipe.yaml").is_file():
        return "new"
    return "finished" if Record.load(folder / name).finished else "begun"


def recipe_file(folder: Path, name: str) -> Path:
    """What a point is started from."""
    return folder / "recipes" / f"{name}.yaml"


def _differs(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Compared as this version completes them: keys that it adds have their defaults in both."""
    return bool(load_recipe(before).complete() != now)


def _write(folder: Path, points: Sequence[dict[str, Any]]) -> None:
    write_document(folder / SWEEP, {"points": list(points)})
