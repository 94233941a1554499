"""The sections of one run's page. Each takes the record alone and says what is missing where the run has not come so far."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from fedgraft.report.blocks import Block, Commands, Facts, Grid, Note, Section
from fedgraft.report.figures import STYLES, Series, curves, dots
from fedgraft.report.record import Record
from fedgraft.report.table import FIGURES, Table, run_tables

RunSection: TypeAlias = Callable[[Record], Section]
RESUME = "fedgraft resume ."
FULL_CURVES = 20_000  # values of all clients' curves; beyond, their range stands for them
CATEGORIES = 12  # columns of the data table; beyond, each client's largest categories are named


def quality(record: Record) -> Section:
    """How good each client's models are."""
    tables = run_tables(record)
    if not tables:
        text = f"Not evaluated yet: the figures come after the last round. In the folder of this run, continue with: {RESUME}"
        return Section(name="quality", title="Quality", blocks=[Note(text=text, missing=True)])
    blocks: list[Block] = [headline(tables, "models"), Note(text=f"Each client's own {_split(record)} rows; {MODELS}")]
    ends = [name for name in ("base", "personal") if name in tables[0].columns] or tables[0].columns[:2]
    sentence = f"For each client the {tables[0].title} of {' and '.join(ends)}, joined by a line; lower is better."
    rows = {client: {name: row[name] for name in ends if name in row} for client, row in tables[0].clients.items()}
    styles = {name: f"s{number}" for number, name in enumerate(ends)}
    blocks.append(dots("quality-dots", "What personalisation brings each client", sentence, rows, styles, x_title=tables[0].title))
    blocks.extend(grid(table) for table in tables)
    return Section(name="quality", title="Quality", blocks=blocks)


MODELS = (
    "base is the untouched model, shared has the aggregated leaves alone, trained is the client's model before aggregation, "
    "personal the method's product: the client's own leaves with the aggregated ones."
)


def training(record: Record) -> Section:
    """Training loss of every client, and the learning rate."""
    title, rounds = "Training", record.rounds
    if not any(line.get("loss") is not None for line in rounds):
        reason = "No round is finished yet" if not rounds else "Nobody trained in the rounds that are done"
        return Section(
            name="training", title=title, blocks=[Note(text=f"{reason}, so there is no curve. Continue with: {RESUME}", missing=True)]
        )
    span = span_of(record)
    loss = curves(
        "training-loss",
        "Training loss",
        _loss_sentence(record),
        [*_client_curves(record), Series(label="mean", style="mean", points=mean_losses(record))],
        _loss_grid(record),
        x_title="round",
        y_title="nats per response token",
        x=span,
        caption="Mean over the steps of a round, on the client's training rows.",
    )
    rates = [(line["round"] + 1, number(line.get("lr"))) for line in rounds]
    rate = curves(
        "learning-rate",
        "Learning rate",
        f"From {rates[0][1]:.3g} in round {rates[0][0]} to {rates[-1][1]:.3g} in round {rates[-1][0]}.",
        [Series(label="learning rate", style="s0", points=rates)],
        Grid(caption="Learning rate", columns=["round", "learning rate"], rows=[[str(at), f"{value:.3g}"] for at, value in rates]),
        x_title="round",
        y_title="learning rate",
        x=span,
        zero=True,
    )
    return Section(name="training", title=title, blocks=[loss, rate])


def data(record: Record) -> Section:
    """Who has what, and which rows were cut."""
    held: Mapping[str, Mapping[str, int]] = record.environment.get("clients", {})
    if not held:
        return Section(name="data", title="Data", blocks=[Note(text="The environment was not written, so nothing is known.", missing=True)])
    kinds = sorted({kind for counts in held.values() for kind in counts})
    rows, narrow = [], len(kinds) <= CATEGORIES
    for client, counts in held.items():
        shares = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        named = [f"{kind}: {count:,}" for kind, count in shares[:3]] + ([f"{len(shares) - 3} more"] if len(shares) > 3 else [])
        parts = [f"{counts[kind]:,}" if kind in counts else "" for kind in kinds] if narrow else ["; ".join(named)]
        rows.append([client, f"{sum(counts.values()):,}", *parts, *_cut(record, client)])
    columns = ["client", "training rows", *(kinds if narrow else ["largest categories"]), "cut in training", "cut in evaluation"]
    table = Grid(caption="Training rows of each client by category, and rows cut to the longest length", columns=columns, rows=rows)
    longest = record.recipe.get("data", {}).get("max_length", "the longest length")
    text = f"A row of more than {longest} tokens is cut, its context first. Training counts a row each time it is drawn."
    return Section(name="data", title="Data", blocks=[table, Note(text=text)])


def settings(record: Record) -> Section:
    """The complete recipe."""
    blocks = []
    sections = {name: value for name, value in record.recipe.items() if isinstance(value, dict) and value}
    alone = {name: value for name, value in record.recipe.items() if name not in sections}
    for name, section in {**sections, **({"run": alone} if alone else {})}.items():
        rows = [[key, shown(value)] for key, value in flat(section)]
        blocks.append(Grid(caption=name, columns=["key", "value"], rows=rows, numeric=False))
    return Section(name="settings", title="Settings", blocks=blocks, dense=True)


def environment(record: Record) -> Section:
    """What the run ran on."""
    known = {name: value for name, value in record.environment.items() if name not in {"schema", "clients"}}
    if not known:
        return Section(name="environment", title="Environment", blocks=[Note(text="The environment was not written.", missing=True)])
    if "command" in known:
        known["command"] = shlex.join(map(str, known["command"]))
    return Section(name="environment", title="Environment", blocks=[Facts(items=[(name, shown(value)) for name, value in flat(known)])])


def reproduce(record: Record) -> Section:
    """The commands that lead to the same bits, or on from here."""
    blocks: list[Block] = []
    if not record.finished:
        blocks.append(Commands(label="Finish this run, in its folder", lines=[RESUME]))
    blocks.append(
        Commands(
            label="Run it again, in the folder of this run; the complete recipe lies there",
            lines=["fedgraft run recipe.yaml --out ../again", "cat ../again/digest.txt"],
        )
    )
    if record.digest:
        blocks.append(Facts(items=[("digest to be expected", record.digest)]))
    text = "The same bits need the same base model, data, package versions, device and thread count; the environment above names them."
    return Section(name="reproduce", title="How to reproduce", blocks=[*blocks, Note(text=text)])


def headline(tables: Sequence[Table], columns: str) -> Grid:
    """Mean and worst client of every figure."""
    names = list(dict.fromkeys(name for table in tables for name in table.columns))
    rows = []
    for table in tables:
        arrow = "higher is better" if FIGURES[table.figure][1] else "lower is better"
        for key, label in (("mean", f"{table.title}, {arrow}"), ("std", "deviation over clients"), ("worst", "worst client")):
            rows.append([label, *(_value(table.summary[key], name, table.digits) for name in names)])
    return Grid(caption=f"All clients: figures x {columns}", columns=["figure", *names], rows=rows, groups=3)


def grid(table: Table) -> Grid:
    """A figure's clients x columns with their summary."""
    return Grid(
        caption=table.title,
        columns=["client", *table.columns],
        rows=[[client, *(_value(row, name, table.digits) for name in table.columns)] for client, row in table.clients.items()],
        feet=[[name, *(_value(row, column, table.digits) for column in table.columns)] for name, row in table.summary.items()],
    )


def span_of(record: Record) -> tuple[float, float]:
    """First and last planned round; a run that stopped shows the room that is left."""
    return 1, max(1, int(record.recipe.get("federation", {}).get("rounds", 1)), len(record.rounds))


def mean_losses(record: Record) -> list[tuple[float, float]]:
    """(round, mean training loss over its clients)."""
    return [(line["round"] + 1, number(line.get("loss"))) for line in record.rounds]


def number(value: Any) -> float:
    """A figure of a round; not a number where there is none."""
    return float(value) if isinstance(value, int | float) else math.nan


def flat(values: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{head}{name}.")
        else:
            yield f"{head}{name}", value


def shown(value: Any) -> str:
    """A setting as people write it."""
    if isinstance(value, list | tuple):
        return ", ".join(shown(one) for one in value) or "none"
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _split(record: Record) -> str:
    return str(record.recipe.get("evaluation", {}).get("split", "test"))


def _value(row: Mapping[str, float], name: str, digits: int) -> str:
    return f"{row[name]:.{digits}f}" if name in row else "–"


def _client_losses(record: Record) -> dict[str, list[tuple[float, float]]]:
    names = sorted({client for line in record.rounds for client in line.get("clients", {})})
    losses: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for line in record.rounds:
        for client, facts in line.get("clients", {}).items():
            losses[client].append((line["round"] + 1, number(facts.get("loss"))))
    return losses


def _client_curves(record: Record) -> list[Series]:
    """A curve per client, named where they can be told apart; the lowest and the highest loss where there are too many."""
    losses = _client_losses(record)
    if sum(map(len, losses.values())) > FULL_CURVES:
        ends = [_ends(line) for line in record.rounds]
        return [
            Series(
                label=f"{name} client",
                style="many",
                points=[(line["round"] + 1, pair[end]) for line, pair in zip(record.rounds, ends, strict=True)],
            )
            for end, name in enumerate(("lowest", "highest"))
        ]
    if len(losses) > STYLES:
        return [Series(label="a client" if not at else "", style="many", points=points) for at, points in enumerate(losses.values())]
    return [Series(label=client, style=f"s{at}", points=points) for at, (client, points) in enumerate(losses.items())]


def _ends(line: Mapping[str, Any]) -> tuple[float, float]:
    values = [number(facts.get("loss")) for facts in line.get("clients", {}).values()]
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (math.nan, math.nan)


def _loss_sentence(record: Record) -> str:
    means = [(at, value) for at, value in mean_losses(record) if math.isfinite(value)]
    (first, began), (last, ended) = means[0], means[-1]
    return f"The mean over clients goes from {began:.3f} in round {first:g} to {ended:.3f} in round {last:g}."


def _loss_grid(record: Record) -> Grid:
    """Rounds x clients, or the spread over clients where that would be endless."""
    losses = _client_losses(record)
    if len(losses) <= STYLES:
        by_round = {client: dict(points) for client, points in losses.items()}
        columns = ["round", "mean", *losses]
        rows = [[f"{at:g}", f"{mean:.3f}", *(_value(points, at, 3) for points in by_round.values())] for at, mean in mean_losses(record)]  # type: ignore[arg-type]
        return Grid(caption="Training loss per round and client", columns=columns, rows=rows)
    rows = []
    for line in record.rounds:
        values = sorted(value for facts in line.get("clients", {}).values() if math.isfinite(value := number(facts.get("loss"))))
        spread = [values[0], statistics.median(values), values[-1]] if values else [math.nan] * 3
        rows.append([str(line["round"] + 1), *(f"{value:.3f}" for value in (number(line.get("loss")), *spread)), str(len(values))])
    return Grid(
        caption="Training loss per round over clients", columns=["round", "mean", "lowest", "median", "highest", "clients"], rows=rows
    )


def _cut(record: Record, client: str) -> tuple[str, str]:
    """Rows cut in training and, of how many, in evaluation."""
    trained = [line["clients"][client].get("truncated", 0) for line in record.rounds if client in line.get("clients", {})]
    models = record.results.get(client, {})
    figures: dict[str, Any] = next(iter(models.values()), {})
    evaluated = f"{figures['truncated']:,} of {figures['rows']:,}" if {"truncated", "rows"} <= figures.keys() else "–"
    return (f"{sum(trained):,}" if trained else "–"), evaluated
