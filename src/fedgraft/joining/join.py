"""A new site joins a federation that has finished: it takes the shared leaves, grafts on its own, and sees from how many rows that pays.

It is an ordinary run of one client, whose shared leaves stay as they are (`lora.init`, `method.frozen_shared`), so it is stopped, resumed,
reported and used as any other. What fewer rows would have given is measured by the way of unseen clients (`evaluation.unseen`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgraft import folders, runner
from fedgraft.data.datasets import jsonl
from fedgraft.data.partition import SAFE_NAME, load_clients
from fedgraft.evaluation.settings import UnseenSettings
from fedgraft.handover.found import recipe_of
from fedgraft.recipe import Recipe, load_recipe
from fedgraft.report.progress import Progress
from fedgraft.report.record import Record

ROWS = (10, 30, 100)
PASSES = 3
"""Over the training rows, in whole rounds, without `--steps`."""
CARRIED = ("model", "graft", "lora", "selection", "training", "seed")
"""Sections of the federation's recipe that the new site takes as they are."""
JUDGED = ("batch_size", "max_new_tokens", "generate_rows", "resamples")
"""Keys of its `evaluation` of which the same holds."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """What the site has with some of its training rows; losses in nats per response token on its test rows."""

    rows: int
    base: float
    shared: float
    personal: float
    gain: float
    """Shared - personal."""
    interval: tuple[float, float] | None
    """Of the gain, for other test rows at 95 %; None of too few."""


def join(
    federation: str | Path,
    data: str | Path,
    *,
    name: str | None = None,
    out: str | Path | None = None,
    rows: Sequence[int] = ROWS,
    steps: int | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Record:
    """Graft and tune on the rows at `data`, into a new run folder with one client.

    Args:
        federation: folder of a finished run, or an export of its shared leaves (`fedgraft export --client shared --as fedgraft`).
        data: a JSON-lines file, or a folder of such files; its splits are those of the dataset `jsonl`.
        name: the new client's; None: the file's or folder's.
        out: the new folder; None makes one under `runs/`.
        rows: numbers of training rows to try beside all; those that there are not are left out.
        steps: optimiser steps for each of them; None: three passes over its rows.
        overrides: `section.key=value` assignments.
        progress: where to report; None says nothing.

    Raises:
        ValueError: nothing to join, another base, unusable rows, an occupied folder; names place and remedy.
    """
    recipe = joined_recipe(federation, data, name=name, rows=rows, steps=steps, overrides=overrides)
    return runner.run(recipe, out=out if out is not None else folders.fresh(f"join-{recipe.data.name}"), progress=progress)


def joined_recipe(
    federation: str | Path, data: str | Path, *, name: str | None, rows: Sequence[int], steps: int | None, overrides: Sequence[str]
) -> Recipe:
    """The recipe of `join`.

    Raises:
        ValueError: as `join`, as far as that shows without a model.
    """
    values = recipe_of(federation)
    if "method" not in values:
        raise ValueError(
            f"{federation}: a PEFT adapter tells no recipe to join by; name a run or its export, or start a run from the adapter: "
            "fedgraft import"
        )
    path = Path(data).expanduser()
    held: dict[str, Any] = {"dataset": "jsonl", "path": str(path), "partition": "files", "name": name or jsonl.stem(path)}
    held |= {key: values["data"][key] for key in ("template", "max_length")}
    if not SAFE_NAME.fullmatch(held["name"]):
        raise ValueError(f"--name {held['name']!r}: cannot name a folder; use letters, digits, '.', '_' and '-'")
    taken = {part: values[part] for part in CARRIED if part in values}
    taken["lora"] = {**taken.get("lora", {}), "init": str(federation)}
    options = {key: value for key, value in values["method"].items() if key == "private_router" and values["method"]["name"] == "flex"}
    taken |= {"data": held, "method": {"name": "flex", "frozen_shared": True, **options}}
    return _with_rows(load_recipe(taken, list(overrides)), values.get("evaluation", {}), rows, steps)


def _with_rows(recipe: Recipe, evaluation: Mapping[str, Any], rows: Sequence[int], steps: int | None) -> Recipe:
    """The recipe with steps and measurements that fit the rows there are."""
    (site,) = load_clients(recipe.data, recipe.seed)
    adapting = UnseenSettings(passes=PASSES) if steps is None else UnseenSettings(rounds=_rounds(recipe, steps))
    each = recipe.training.steps if steps is None else steps // adapting.rounds
    rounds = adapting.rounds_of(len(site.train), each * recipe.training.batch_size)
    fewer = sorted({count for count in rows if 0 < count < len(site.train)})
    judged = {key: evaluation[key] for key in JUDGED if key in evaluation}
    judged |= {"generate": False, "experts": False, "knowledge_tokens": 0}
    if fewer:
        judged["unseen"] = {"clients": "all", "rows": fewer, "rounds": adapting.rounds, "passes": adapting.passes}
    values = recipe.model_dump(mode="json", exclude_unset=True)
    values["training"] = {**values.get("training", {}), "steps": each, "least_steps": None, "lr_min": recipe.training.lr}
    values["federation"] = {"rounds": rounds, **values.get("federation", {})}
    values["evaluation"] = {**judged, **values.get("evaluation", {}), "models": ["base", "shared", "personal"]}
    return load_recipe(values)


def _rounds(recipe: Recipe, steps: int) -> int:
    """Rounds of equal length that make just so many steps, none longer than the recipe's."""
    return next(steps // each for each in range(min(recipe.training.steps, steps), 0, -1) if steps % each == 0)


def lines_of(record: Record) -> list[Line]:
    """What the site has with how many rows, the fewest first; the last line is the model that was kept."""
    ((client, models),) = record.results.items()
    whole = record.environment["rows"][client]["train"]
    fewer = record.further.get("unseen", {}).get(client, {})
    return [_line(int(count), figures) for count, figures in fewer.items()] + [_line(whole, models)]


def _line(rows: int, models: Mapping[str, Any]) -> Line:
    personal = models["personal"]
    interval = personal.get("interval", {}).get("gain_over_shared")
    return Line(
        rows=rows,
        base=models["base"]["loss"],
        shared=models["shared"]["loss"],
        personal=personal["loss"],
        gain=personal["gain_over_shared"],
        interval=None if interval is None else (interval[0], interval[1]),
    )


def verdict(lines: Sequence[Line]) -> str:
    """From how many rows on the site's own graft pays, in words; says so where the test rows are too few to tell, or the base is better."""
    last = lines[-1]
    still = f" The untouched base is better still: {last.base:.3f} beside {last.personal:.3f}." if last.base < last.personal else ""
    return _over_shared(lines) + still


def _over_shared(lines: Sequence[Line]) -> str:
    likely, certain = _from(lines, lambda line: line.gain), _from(lines, lambda line: line.interval[0] if line.interval else -1.0)
    if certain is not None:
        low, high = certain.interval or (certain.gain, certain.gain)
        return (
            f"The graft pays from {certain.rows} training rows on: its loss is {certain.gain:.3f} below the shared model's "
            f"({low:.3f} to {high:.3f})."
        )
    if likely is not None:
        return (
            f"From {likely.rows} training rows on the loss is below the shared model's, but by no more than what other test rows could "
            "change; more of them would tell."
        )
    return "The graft does not pay with these rows: use the shared model, or try other steps (--steps) or more rows."


def _from(lines: Sequence[Line], figure: Any) -> Line | None:
    """The first line from which on a figure is above 0."""
    found = None
    for line in reversed(lines):
        if figure(line) <= 0:
            break
        found = line
    return found
