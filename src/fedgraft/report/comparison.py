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
    """Mean training loss of every run, or of the runs that differ in their seed alone, with its range over seeds."""
    groups = grouped(records)
    by_seed = {group.name: [dict(mean_losses(record)) for record in group.runs] for group in groups}
    spread = {name: _over_seeds(each) for name, each in by_seed.items()}
    if not any(math.isfinite(mean) for rounds in spread.values() for mean, _, _ in rounds.values()):
        return absent("training", "Training", "None of these runs has trained a round yet.")
    last = max(len(record.rounds) for record in records)
    rows = [[str(at), *(_spread_text(rounds.get(at)) for rounds in spread.values())] for at in range(1, last + 1)]
    ended = [f"{name} ends at {list(rounds.values())[-1][0]:.3f}" for name, rounds in spread.items() if rounds]
    look = styles(list(spread))
    many = [group.name for group in groups if len(group.runs) > 1]
    caption = "Mean over clients, then over seeds; shaded: from the lowest seed to the highest." if many else "Mean over clients."
    figure = curves(
        "training-loss",
        "Mean training loss",
        f"{'; '.join(ended)}.",
        [
            Series(
                label=name,
                style=look[name],
                points=[(at, mean) for at, (mean, _, _) in rounds.items()],
                band=[(low, high) for _, low, high in rounds.values()] if name in many else (),
            )
            for name, rounds in spread.items()
        ],
        Grid(caption=f"Mean training loss per round{', with its range over seeds' if many else ''}", columns=["round", *spread], rows=rows),
        x_title="round",
        y_title="nats per response token",
        x=(1, last),
        caption=caption,
    )
    return Section(name="training", title="Training", blocks=[figure])


def _over_seeds(runs: Sequence[dict[float, float]]) -> dict[float, tuple[float, float, float]]:
    """Round -> mean, lowest and highest over the runs that have come so far and trained in it; not a number where none did."""
    found = {}
    for at in sorted({at for run in runs for at in run}):
        losses = [run[at] for run in runs if math.isfinite(run.get(at, math.nan))] or [math.nan]
        found[at] = statistics.fmean(losses), min(losses), max(losses)
    return found


def _spread_text(spread: tuple[float, float, float] | None) -> str:
    if spread is None:
        return "–"
    mean, low, high = spread
    return f"{mean:.3f}" if low == high or math.isnan(mean) else f"{mean:.3f} ({low:.3f} to {high:.3f})"


def price(records: Sequence[Record]) -> Section:
    """What the quality costs in bytes, tokens and seconds."""
    names, rows = labels(records), []
    for name, record in zip(names, records, strict=True):
        total = cost(record)
        per_round = [f"{total[f'bytes_{way}_per_round'] / 1e6:,.2f}" for way in ("up", "down")]
        rows.append([name, *per_round, f"{_sent(record):,.2f}", f"{total['training_tokens']:,}", f"{total['training_seconds']:,.1f}"])
    columns = ["run", "MB up a round", "MB down a round", "MB in all", "training tokens", "seconds"]
    blocks: list[Block] = [Grid(caption="Bytes (fp32, all clients), tokens and seconds of training", columns=columns, rows=rows)]
    points = {
        group.name: [
            (_sent(record), statistics.fmean(losses.values())) for record in group.runs if (losses := record.figures("personal", "loss"))
        ]
        for group in grouped(records)
    }
    look = styles(list(points))
    measured = {name: each for name, each in points.items() if each}
    if measured:
        means = {name: [statistics.fmean(values) for values in zip(*each, strict=True)] for name, each in measured.items()}
        told = [[name, f"{sent:,.2f}", f"{loss:.3f}"] for name, (sent, loss) in means.items()]
        title = FIGURES["loss"][0]
        several = any(len(each) > 1 for each in measured.values())
        sentence = "; ".join(f"{name}: {sent} MB, loss {loss}" for name, sent, loss in told) + (
            ". A mark for each seed." if several else ""
        )
        series = [Series(label=name, style=look[name], points=each) for name, each in measured.items()]
        caption = f"Bytes and quality{', mean over seeds' if several else ''}"
        data = Grid(caption=caption, columns=["run", "MB in all", f"mean {title}"], rows=told)
        blocks.append(
            scatter("bytes-quality", "Bytes and quality", sentence, series, data, x_title="MB up and down in all", y_title="mean " + title)
        )
    return Section(name="cost", title="Cost", blocks=blocks)


def _sent(record: Record) -> float:
    total = cost(record)
    return float(total["bytes_up"] + total["bytes_down"]) / 1e6


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
