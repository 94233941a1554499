"""The sections of a page about several runs."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from fedgraft.report.blocks import Block, Commands, Figure, Grid, Note, Section
from fedgraft.report.figures import Series, curves, dots, scatter
from fedgraft.report.groups import grouped, labels
from fedgraft.report.heat_map import Shade, Sides, heat_map
from fedgraft.report.record import Record
from fedgraft.report.seed_spread import caption, ends, over_seeds, series, told
from fedgraft.report.shaping import MANY, absent, counted, flat, grid, headline, mean_losses, shown, styles, turned
from fedgraft.report.table import FIGURES, Table, compare_tables, cost

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
    text = "A run stands for its personal models, base for the untouched model."
    blocks: list[Block] = [headline(tables, "runs"), Note(text=text), _by_client(records, tables[0])]
    blocks.extend(grid(table, "run") for table in tables)
    return Section(name="quality", title="Quality", blocks=blocks)


def _by_client(records: Sequence[Record], table: Table) -> Figure:
    """Clients x runs: dots, or colours where there are too many runs to tell their dots apart."""
    if len(table.columns) > MANY:
        return _gains(table)
    look = styles(["base", *(group.name for group in grouped(records))])
    look = {name: look[name] for name in table.columns}
    sentence = f"For each client the {table.title} of {', '.join(table.columns)}, joined from best to worst; lower is better."
    return dots("quality-dots", "Client by client", sentence, table.clients, look, x_title=table.title)


def _gains(table: Table) -> Figure:
    """How far below the base, or where that was not measured below the mean over runs, each run brings each client."""
    runs = [name for name in table.columns if name != "base"]
    reference = {client: row.get("base", statistics.fmean(row.values())) for client, row in table.clients.items()}
    gains = {run: {client: reference[client] - row[run] for client, row in table.clients.items() if run in row} for run in runs}
    values = [value for row in gains.values() for value in row.values()]
    low, high = min(values), max(values)

    def shade(run: str, client: str) -> Shade:
        if client not in gains[run]:
            return Shade(text="–", level=math.nan, exact="–")
        value = gains[run][client]
        return Shade(text=f"{value:+z.2f}", level=(value - low) / (high - low) if high > low else 0.0, exact=f"{value:+z.3f}")

    clients = list(table.clients)
    over = "base" if "base" in table.columns else "mean over runs"
    means = {run: statistics.fmean(row.values()) for run, row in gains.items()}
    return heat_map(
        "quality-gains",
        f"Gain of each client over {over}",
        f"In {table.title}; mean over clients: {ends(means)}.",
        {run: [[shade(run, client)] for client in clients] for run in runs},
        scale=(f"{low:+z.2f}", f"{high:+z.2f}"),
        caption="Above 0 is better.",
        sides=Sides(row="run", rows="runs", column="client", columns="clients", names=clients),
    )


def training(records: Sequence[Record]) -> Section:
    """Mean training loss of every run, or of the runs that differ in their seed alone, with its range over seeds."""
    found = {group.name: over_seeds([dict(mean_losses(record)) for record in group.runs]) for group in grouped(records)}
    if not any(math.isfinite(mean) for spread in found.values() for mean, _, _ in spread.values()):
        return absent("training", "Training", "None of these runs has trained a round yet.")
    last = max(len(record.rounds) for record in records)
    rows = [[str(at), *(told(spread, at) for spread in found.values())] for at in range(1, last + 1)]
    ended = {name: spread[max(spread)][0] for name, spread in found.items() if spread}
    figure = curves(
        "training-loss",
        "Mean training loss",
        f"In the last round: {ends(ended)}.",
        series(found),
        Grid(caption="Mean training loss per round", columns=["round", *found], rows=rows, sortable=False),
        x_title="round",
        y_title="nats per response token",
        x=(1, last),
        caption=caption(found),
    )
    return Section(name="training", title="Training", blocks=[figure])


def price(records: Sequence[Record]) -> Section:
    """What the quality costs in bytes, tokens and seconds."""
    names, rows = labels(records), []
    for name, record in zip(names, records, strict=True):
        total = cost(record)
        per_round = [f"{total[f'bytes_{way}_per_round'] / 1e6:,.2f}" for way in ("up", "down")]
        rows.append([name, *per_round, f"{_sent(record):,.2f}", counted(total["training_tokens"]), f"{total['training_seconds']:,.1f}"])
    columns = ["run", "MB up a round", "MB down a round", "MB in all", "training tokens", "seconds"]
    if any(record.spending for record in records):
        columns += ["trained", "FLOPs over base", "peak memory, MB"]
        rows = [[*row, *_machine(record.spending)] for row, record in zip(rows, records, strict=True)]
    blocks: list[Block] = [Grid(caption="Bytes (fp32, all clients), tokens and seconds of training", columns=columns, rows=rows)]
    points = {
        group.name: [
            (_sent(record), statistics.fmean(losses.values())) for record in group.runs if (losses := record.figures("personal", "loss"))
        ]
        for group in grouped(records)
    }
    if any(points.values()):
        blocks.append(_bytes_and_quality(points))
    return Section(name="cost", title="Cost", blocks=blocks)


def _machine(spending: Mapping[str, Any]) -> list[str]:
    """Parameters a client trains, FLOPs of a forward beside those of the base, and the greatest memory of any session."""
    account, sessions = spending.get("account"), spending.get("sessions", [])
    peaks = [session["peak_memory"] for session in sessions if "peak_memory" in session]
    told = [f"{account['trained']:,}", f"{account['flops_grafted'] / account['flops_base']:.3f}"] if account else ["–", "–"]
    return [*told, f"{max(peaks) / 1e6:,.0f}" if peaks else "–"]


def _bytes_and_quality(points: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """`points`: of each group (MB, mean loss) by seed; a group that is not evaluated has none."""
    look, measured = styles(list(points)), {name: each for name, each in points.items() if each}
    means = {name: [statistics.fmean(values) for values in zip(*each, strict=True)] for name, each in measured.items()}
    rows = [[name, f"{sent:,.2f}", f"{loss:.3f}"] for name, (sent, loss) in means.items()]
    several = any(len(each) > 1 for each in measured.values())
    sent, loss = ({name: pair[at] for name, pair in means.items()} for at in (0, 1))
    return scatter(
        "bytes-quality",
        "Bytes and quality",
        f"MB in all: {ends(sent, 2)}; loss: {ends(loss)}." + (" A mark for each seed." if several else ""),
        [Series(label=name, style=look[name], points=each) for name, each in measured.items()],
        Grid(
            caption=f"Bytes and quality{', mean over seeds' if several else ''}",
            columns=["run", "MB in all", f"mean {FIGURES['loss'][0]}"],
            rows=rows,
        ),
        x_title="MB up and down in all",
        y_title=f"mean {FIGURES['loss'][0]}",
    )


def _sent(record: Record) -> float:
    total = cost(record)
    return float(total["bytes_up"] + total["bytes_down"]) / 1e6


def differences(records: Sequence[Record]) -> Section:
    """The settings in which the recipes differ; runs that differ in their seed alone are one."""
    title, groups = "Differences between the recipes", grouped(records)
    recipes = [
        dict(flat({key: part for key, part in group.runs[0].recipe.items() if key != "seed" or len(group.runs) == 1})) for group in groups
    ]
    keys = [
        key
        for key in dict.fromkeys(key for recipe in recipes for key in recipe)
        if len({shown(recipe.get(key, "–")) for recipe in recipes}) > 1
    ]
    if not keys:
        but = ", but for their seeds" if len(groups) < len(records) else ""
        return absent("differences", "Differences", f"The recipes are the same in every key{but}.", missing=False)
    caption, names = "Keys in which the recipes differ", [group.name for group in groups]
    if min(len(names), len(keys)) > MANY:  # too many both ways for a table of all
        told = ["; ".join(f"{key} {shown(recipe[key])}" for key in keys if key in recipe) for recipe in recipes]
        columns, rows = ["run", "keys that others have otherwise"], [list(pair) for pair in zip(names, told, strict=True)]
        return Section(name="differences", title=title, blocks=[Grid(caption=caption, columns=columns, rows=rows, numeric=False)])
    rows = [[key, *(shown(recipe[key]) if key in recipe else "–" for recipe in recipes)] for key in keys]
    table = Grid(caption=caption, columns=["key", *names], rows=rows, numeric=False)
    return Section(name="differences", title=title, blocks=[turned(table, "run") if len(names) > MANY else table])


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
