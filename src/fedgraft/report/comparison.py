"""The sections of a page about several runs."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from typing import TypeAlias

from fedgraft.report.blocks import Block, Commands, Grid, Note, Section
from fedgraft.report.figures import Series, curves, dots, scatter
from fedgraft.report.groups import grouped, labels
from fedgraft.report.record import Record
from fedgraft.report.shaping import absent, flat, grid, headline, mean_losses, shown, styles
from fedgraft.report.table import FIGURES, compare_tables, cost

ComparisonSection: TypeAlias = Callable[[Sequence[Record]], Section]


def runs(records: Sequence[Record]) -> Section:
    """Which runs they are and how far they have come."""
    rows = []
    for name, record in zip(labels(records), records, strict=True):
        planned = record.recipe.get("federation", {}).get("rounds", "?")
        state = "finished" if record.finished else "unfinished"
        seed = shown(record.recipe.get("seed"))
        rows.append([name, record.method, seed, f"{len(record.rounds)} of {planned}", state, str(record.folder), record.digest[:12] or "–"])
    table = Grid(caption="Runs", columns=["run", "method", "seed", "rounds", "state", "folder", "digest"], rows=rows, numeric=False)
    blocks: list[Block] = [table]
    for record in records:
        if not record.results:
            command = f"fedgraft resume {shlex.quote(str(record.folder))}"
            text = f"{record.folder} is not evaluated yet and has no figures; finish it with: {command}"
            blocks.append(Note(text=text, missing=True))
    return Section(name="runs", title="Runs", blocks=blocks)


def quality(records: Sequence[Record]) -> Section:
    """Every figure of the personal models, clients x runs; a client's mean over the seeds of runs that differ in nothing else."""
    tables = compare_tables(records)
    if not tables:
        return absent("quality", "Quality", "None of these runs is evaluated yet.")
    blocks: list[Block] = [headline(tables, "runs"), Note(text="The column of a run holds its personal models, base the untouched model.")]
    first = tables[0]
    look = styles(["base", *(group.name for group in grouped(records))])
    look = {name: look[name] for name in first.columns}
    sentence = f"For each client the {first.title} of {', '.join(first.columns)}, joined from best to worst; lower is better."
    blocks.append(dots("quality-dots", "Client by client", sentence, first.clients, look, x_title=first.title))
    blocks.extend(grid(table) for table in tables)
    return Section(name="quality", title="Quality", blocks=blocks)


def training(records: Sequence[Record]) -> Section:
    """Mean training loss of every run."""
    names = labels(records)
    points = {name: mean_losses(record) for name, record in zip(names, records, strict=True)}
    if not any(math.isfinite(value) for losses in points.values() for _, value in losses):
        return absent("training", "Training", "None of these runs has trained a round yet.")
    last = max(len(record.rounds) for record in records)
    by_round = {name: dict(losses) for name, losses in points.items()}
    rows = [[str(at), *(f"{losses[at]:.3f}" if at in losses else "–" for losses in by_round.values())] for at in range(1, last + 1)]
    ended = [f"{name} ends at {losses[-1][1]:.3f}" for name, losses in points.items() if losses]
    look = styles(names)
    figure = curves(
        "training-loss",
        "Mean training loss",
        f"{'; '.join(ended)}.",
        [Series(label=name, style=look[name], points=losses) for name, losses in points.items()],
        Grid(caption="Mean training loss per round", columns=["round", *names], rows=rows),
        x_title="round",
        y_title="nats per response token",
        x=(1, last),
    )
    return Section(name="training", title="Training", blocks=[figure])


def price(records: Sequence[Record]) -> Section:
    """What the quality costs in bytes, tokens and seconds."""
    names, rows, points = labels(records), [], []
    look = styles(names)
    for name, record in zip(names, records, strict=True):
        total = cost(record)
        sent = (total["bytes_up"] + total["bytes_down"]) / 1e6
        per_round = [f"{total[f'bytes_{way}_per_round'] / 1e6:,.2f}" for way in ("up", "down")]
        rows.append([name, *per_round, f"{sent:,.2f}", f"{total['training_tokens']:,}", f"{total['training_seconds']:,.1f}"])
        losses = record.figures("personal", "loss")
        if losses:
            points.append(Series(label=name, style=look[name], points=[(sent, statistics.fmean(losses.values()))]))
    columns = ["run", "MB up a round", "MB down a round", "MB in all", "training tokens", "seconds"]
    blocks: list[Block] = [Grid(caption="Bytes (fp32, all clients), tokens and seconds of training", columns=columns, rows=rows)]
    if points:
        told = [[one.label, f"{one.points[0][0]:,.2f}", f"{one.points[0][1]:.3f}"] for one in points]
        title = FIGURES["loss"][0]
        sentence = "; ".join(f"{name}: {sent} MB, loss {loss}" for name, sent, loss in told)
        data = Grid(caption="Bytes and quality", columns=["run", "MB in all", f"mean {title}"], rows=told)
        blocks.append(
            scatter("bytes-quality", "Bytes and quality", sentence, points, data, x_title="MB up and down in all", y_title="mean " + title)
        )
    return Section(name="cost", title="Cost", blocks=blocks)


def differences(records: Sequence[Record]) -> Section:
    """The settings in which the recipes differ."""
    names, recipes = labels(records), [dict(flat(record.recipe)) for record in records]
    keys = [
        key
        for key in dict.fromkeys(key for recipe in recipes for key in recipe)
        if len({shown(recipe.get(key, "–")) for recipe in recipes}) > 1
    ]
    if not keys:
        return absent("differences", "Differences", "The recipes are the same in every key.", missing=False)
    rows = [[key, *(shown(recipe[key]) if key in recipe else "–" for recipe in recipes)] for key in keys]
    table = Grid(caption="Keys in which the recipes differ", columns=["key", *names], rows=rows, numeric=False)
    return Section(name="differences", title="Differences between the recipes", blocks=[table])


def reproduce(records: Sequence[Record]) -> Section:
    """The commands that lead to the same bits, and the digests to be expected."""
    lines = [
        f"fedgraft run {shlex.quote(str(record.folder / 'recipe.yaml'))} --out again/{at}" for at, record in enumerate(records, start=1)
    ]
    names = labels(records)
    rows = [[name, record.digest or "not finished"] for name, record in zip(names, records, strict=True)]
    digests = Grid(
        caption="Digests to be expected in again/<n>/digest.txt, in this order", columns=["run", "digest"], rows=rows, numeric=False
    )
    text = (
        "The same bits need the same base model, data, package versions, device and thread count; each run's environment.json names them."
    )
    return Section(
        name="reproduce", title="How to reproduce", blocks=[Commands(label="Run them again", lines=lines), digests, Note(text=text)]
    )
