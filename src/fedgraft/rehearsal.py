"""A run's first minutes without its first step: everything that can go wrong before training goes wrong here. Writes nothing."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgraft import folders
from fedgraft.account.rows import Rows, look_at_rows
from fedgraft.bundle import Bundle
from fedgraft.evaluation.response import response_figures
from fedgraft.methods.method import Method, Prediction, personal_leaves
from fedgraft.reach import Here
from fedgraft.recipe import Recipe, load_recipe
from fedgraft.report.progress import Progress, Quiet
from fedgraft.session import Session
from fedgraft.training.client import Client
from fedgraft.tree import combine, partition
from fedgraft.trouble import Stand, told

TOKENS = 64
"""Calibration tokens of the selection that is tried."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What was tried."""

    folder: Path
    """Where the run would be written."""
    rows: list[Rows]
    client: str
    """The one whose first batch went through the model."""
    loss: float
    """Its loss before training, nats per response token."""
    keeps: int
    """Bytes that kept replies will take at most; 0 where none are kept."""


def rehearse(
    recipe: str | Path | dict[str, Any] | Recipe | None = None,
    *,
    out: str | Path | None = None,
    overrides: list[str] | None = None,
    progress: Progress | None = None,
) -> Rehearsal:
    """Do everything that `runner.run` does before the first optimiser step.

    Load, tokenise every row, draw every client's first batch, choose experts on a few tokens and send one batch through the model.

    Raises:
        ValueError: what `runner.run` would raise, or an output folder that could not be made.
    """
    checked = load_recipe(recipe, overrides)
    folder = Path(out) if out is not None else folders.fresh(checked.method.name)
    stand = Stand(folder)
    with told(stand):
        folders.refuse_occupied(folder)
        _check_writable(folder)
        session = Session(checked.absolute(), folder, progress or Quiet(), stand, Here)
        session.progress.begin("rehearsal", len(session.reach.clients) + 1)
        assert isinstance(session.reach, Here)
        open_client = session.reach.holdings.open
        rows = [_rows(session, open_client(name)) for name in session.reach.clients]
        first = open_client(session.reach.clients[0])
        stand.phase = "training"
        loss = _first_loss(session.method, first)
        session.progress.step(f"{first.name}  loss {loss:.3f}")
    return Rehearsal(folder=folder, rows=rows, client=first.name, loss=loss, keeps=session.kept.most)


def _rows(session: Session, client: Client) -> Rows:
    """Tokenise all of a client's training rows and draw its first batch."""
    settings = session.recipe
    tokenizer, batch = client.model.base.tokenizer, settings.training.batch_size
    rows = look_at_rows(client.data, settings.data, tokenizer, batch=batch, most=client.examples)
    client.batches(0)
    session.progress.step(f"{client.name}  {rows.cut} of {rows.train} rows cut")
    return rows


def _first_loss(method: Method, client: Client) -> float:
    """The loss of the first batch's rows with fresh leaves, grafts on experts chosen from a few tokens."""
    if "side" in method.places:
        client.selection = client.selection.model_copy(update={"tokens": TOKENS})
        method.graft(method, client, Bundle())
    fresh = client.model.fresh_adapters(client.seed) if "adapters" in method.places else {}
    shared, _ = partition(fresh, lambda key: not method.personal(key))
    model = Prediction(tree=combine(shared, personal_leaves(method, client)), experts=client.experts)
    size = client.training.batch_size
    loss = float(response_figures(client, model, client.data.train[:size], size)["loss"])
    if not math.isfinite(loss):
        raise ValueError(f"client {client.name!r}: the loss before training is {loss}; check the data and the base model")
    return loss


def _check_writable(folder: Path) -> None:
    there = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: cannot be written, {there} is {'not writable' if there.is_dir() else 'a file'}; choose another --out")
