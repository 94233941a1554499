"""The points of a sweep, all of them checked before the first one runs.

A sweep file is a recipe with up to three further sections:

    grid:                                   # every combination is a point
      method.name: [fedavg, flex]
      seed: [0, 1, 2]
    variants:                               # named changes, each combined with the whole grid
      low_gate: {graft.gate_start: low}
    per_method:                             # what holds for one method only, such as a tuned learning rate
      fedavg: {training.lr: 1e-3}

Keys are those of a recipe, dotted; `method` is short for `method.name`. Where they meet, the grid wins over the variant, the variant over
`per_method`, that over the recipe. What a point's method does not use (its `lora`, `graft` and `selection` sections, and the options of
another method) is left out, and points that are then the same are one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fedgraft import plugins
from fedgraft.recipe import METHOD_SECTIONS, SWEEP_SECTIONS, Recipe, assign, check_values, load_recipe, read_values
from fedgraft.yaml_text import read_value

LONGEST = 80  # characters of a name, so that paths stay below the limit of Windows
PLAIN = re.compile(r"[a-z0-9_+-][a-z0-9_.+-]*")  # what every file system keeps as it is, upper and lower case not told apart
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d|conin\$|conout\$|recipes|logs)(\..*)?")
LEADING = {"variant": 0, "method.name": 1}  # in names, where the seed comes last and the others in alphabetical order
SHORT = {"method": "method.name"}
Settings = dict[str, Any]
"""Dotted recipe key -> value."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep."""

    name: str
    """Its folder: readable, a function of variant and grid values alone."""
    settings: Settings
    """What tells it apart: `variant` and the keys of the grid."""
    recipe: Recipe


def plan(source: str | Path | dict[str, Any], grids: Sequence[str] = (), overrides: list[str] | None = None) -> list[Point]:
    """The points, the first grid key changing slowest.

    Args:
        source: a recipe or sweep file, its name or values.
        grids: `key=value,value` with YAML values; one whose key the file's grid has too replaces that.
        overrides: `section.key=value` assignments for all points, below `per_method`, variants and grid.

    Raises:
        ValueError: any point is no valid recipe; the message names the point.
    """
    where, values = read_values(source, overrides)
    sections = {name: values.pop(name, None) or {} for name in SWEEP_SECTIONS}
    axes = _axes(sections["grid"], grids, where)
    variants = _changes(sections["variants"], f"{where}: variants") or {"": {}}
    per_method = _changes(sections["per_method"], f"{where}: per_method")
    for method in per_method:
        plugins.load("method", method)
    points: dict[str, Point] = {}
    for variant, change in variants.items():
        for combination in product(*axes.values()):
            point = _point(values, per_method, variant, change, dict(zip(axes, combination, strict=True)), where)
            known = points.setdefault(point.name, point)
            if known.recipe.complete() != point.recipe.complete():
                raise ValueError(f"{where}: two different points would be called {point.name!r}; give one of them another value or name")
    return list(points.values())


def _axes(written: Any, grids: Sequence[str], where: str) -> dict[str, list[Any]]:
    """Dotted key -> values."""
    if not isinstance(written, dict):
        raise ValueError(f"{where}: grid: write a mapping of keys to lists of values")
    axes: dict[str, list[Any]] = {}
    for place, key, value in [*((f"{where}: grid", str(key), value) for key, value in written.items()), *_from_words(grids)]:
        if not isinstance(value, list) or not value:
            raise ValueError(f"{place}: {key}: write at least one value, several as a list (got {value!r})")
        axes[SHORT.get(key, key)] = value
    return axes


def _from_words(grids: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    for text in grids:
        key, equals, values = text.partition("=")
        if not equals or not key.strip() or not values.strip():
            raise ValueError(f"--grid {text}: write key=value,value, such as seed=0,1,2")
        yield f"--grid {text}", key.strip(), read_value(f"[{values}]", f"--grid {text}")


def _changes(written: Any, place: str) -> dict[str, Settings]:
    """Name -> changes by dotted key."""
    if not isinstance(written, dict) or not all(change is None or isinstance(change, dict) for change in written.values()):
        raise ValueError(f"{place}: write names, each with a mapping of recipe keys to values")
    return {str(name): {SHORT.get(str(key), str(key)): value for key, value in (change or {}).items()} for name, change in written.items()}


def _point(values: Settings, per_method: Mapping[str, Settings], variant: str, change: Settings, chosen: Settings, where: str) -> Point:
    named = {**({"variant": variant} if variant else {}), **chosen}
    at = f"{where}, point {', '.join(f'{key}={_text(value)}' for key, value in named.items()) or 'without a grid'}"
    asked = {**change, **chosen}
    base = _method_name(values)
    method = str(asked.get("method.name", base))
    if method != base:  # the options in the recipe are those of its own method
        values = {**values, "method": {"name": method}}
    for key, value in {**per_method.get(method, {}), **asked}.items():
        values = assign(values, key, value)
    try:
        whole = check_values(values, at)  # also sections that are dropped below, so that a misspelt key is never silent
        used = whole.build_method(unused_allowed=True).sections
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(at) else f"{at}: {error}") from None
    unused = METHOD_SECTIONS - used
    recipe = load_recipe({section: value for section, value in values.items() if section not in unused})
    settings = {key: value for key, value in named.items() if key.split(".")[0] not in unused}
    return Point(name=_name(settings), settings=settings, recipe=recipe.absolute())


def _method_name(values: Settings) -> str:
    section = values.get("method")
    return str(section["name"] if isinstance(section, dict) and "name" in section else Recipe().method.name)


def _name(settings: Settings) -> str:
    """`flex_lora.rank-8_seed-0`; with a digest of the settings where a file system would not keep it as it is, or it is too long."""
    order = sorted(settings, key=lambda key: (LEADING.get(key, len(LEADING)) if key != "seed" else len(LEADING) + 1, key))
    words = [_text(settings[key]) if key in LEADING else f"{key}-{_text(settings[key])}" for key in order]
    name = "_".join(words) or "run"
    if PLAIN.fullmatch(name) and not RESERVED.fullmatch(name) and not name.endswith(".") and len(name) <= LONGEST:
        return name
    told = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
    kept = re.sub(r"[^a-z0-9_.+-]+", "-", name.lower())[: LONGEST - 9].strip(".-")
    return f"{kept}-{told}" if kept else told


def _text(value: Any) -> str:
    """A value as part of a name."""
    if isinstance(value, list | tuple):
        return "+".join(_text(one) for one in value)
    return value if isinstance(value, str) else json.dumps(value, default=str).strip('"')
