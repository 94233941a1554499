"""Experts chosen before a run, on a base of which one decoder layer is in memory at a time.

The run reads the file (`selection.file`), with its base quantised, offloaded, or on another machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedgraft.data.batches import Batch, Row, encode
from fedgraft.data.calibration import generic_rows, in_batches, own_rows
from fedgraft.data.example import Example
from fedgraft.data.partition import ClientData
from fedgraft.hosting import Holdings
from fedgraft.moe.layered import open_layered
from fedgraft.moe.load import Base
from fedgraft.recipe import Recipe, load_recipe
from fedgraft.report.progress import Progress, Quiet
from fedgraft.selection.choose import needs_gram
from fedgraft.selection.prepared import write_choices
from fedgraft.selection.select import Choice, choice_by
from fedgraft.selection.streamed import measure_streamed
from fedgraft.trouble import Stand, told


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What was chosen."""

    path: Path
    choices: dict[str, Choice]
    """By client."""
    layers: int
    """MoE layers of the base."""


def choose_beforehand(
    recipe: str | Path | dict[str, Any] | Recipe | None = None,
    *,
    out: str | Path,
    overrides: list[str] | None = None,
    progress: Progress | None = None,
) -> Chosen:
    """Choose the experts of every client as a run of the recipe would, and write them to a new file.

    Each weight is read once for all clients together. Memory holds the embeddings, a decoder layer and the hidden states of the calibration
    tokens of all clients; of these what would fill more than a fourth of the free memory lies beside `out` on disk meanwhile.

    Raises:
        ValueError: as `runner.run`, a method without grafts, a model whose layers can't be run one at a time, or `out` exists.
    """
    checked, path, heard = load_recipe(recipe, overrides), Path(out), progress or Quiet()
    stand = Stand(path.parent)
    if path.exists():
        raise ValueError(f"{path}: exists and is never overwritten; choose another --out")
    if "side" not in checked.build_method().places:
        raise ValueError(
            f"method.name: {checked.method.name!r} grafts no experts, so there is nothing to choose; take one that does (flex)"
        )
    recipe = checked.model_copy(update={"selection": checked.selection.model_copy(update={"file": None})}).absolute()
    with told(stand):
        path.parent.mkdir(parents=True, exist_ok=True)
        heard.begin("loading", 2)
        holdings = Holdings(recipe, path.parent)
        holdings.hold_out()
        clients = holdings.pool or holdings.clients
        heard.step(f"data; next the outer parts of the base model {recipe.model.name}")
        layered = open_layered(recipe.model)
        base, settings, graft = layered.base, recipe.selection, recipe.graft
        heard.step("model")
        for note in base.notes:
            heard.warn(note)
        stand.phase = "selection"
        first = next(iter(clients))
        measured = clients if settings.text == "own" else {first: clients[first]}  # generic text is the same for all
        profiles = measure_streamed(
            layered,
            {name: calibration(data, recipe, base) for name, data in measured.items()},
            settings.budget(base.device.type),
            gram=needs_gram(settings.criterion, max(graft.per_layer, graft.mixture)),
            progress=partial(_passed, heard),
            scratch=path.parent,
        )
        choices = {
            name: choice_by(profiles.get(name, profiles[first]), settings, graft.per_layer, recipe.seed, name, graft.mixture)
            for name in clients
        }
        about = {"base": recipe.model.name, "base_digest": base.digest, "criterion": settings.criterion, "text": settings.text}
        write_choices(path, {**about, "dtype": recipe.model.dtype}, choices, clients)
    return Chosen(path=path, choices=choices, layers=len(base.sites))


def calibration(data: ClientData, recipe: Recipe, base: Base) -> Iterator[Batch]:
    """The batches that the client would choose by in a run."""
    settings, length = recipe.data, recipe.data.max_length

    def row(example: Example) -> Row:
        return encode(example, base.tokenizer, settings.template, length)[0]

    own = recipe.selection.text == "own"
    rows = own_rows(data.train, row, recipe.seed, data.name) if own else generic_rows(base.tokenizer, length, recipe.seed)
    return in_batches(rows, recipe.selection.budget(base.device.type), length, base.pad_id)


def _passed(progress: Progress, done: int, total: int) -> None:
    if done == 0:
        progress.begin("selection", total)
    else:
        progress.step(f"layer {done} of {total}")
