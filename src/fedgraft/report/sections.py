"""The sections of one run's page. Each takes the record alone and says what is missing where the run has not come so far."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from fedgraft.report.bars import stacked
from fedgraft.report.blocks import Block, Commands, Facts, Figure, Grid, Note, Section
from fedgraft.report.figures import STYLES, dots
from fedgraft.report.record import Record
from fedgraft.report.shaping import LISTED, RESUME, absent, flat, grid, headline, listed, shown, styles
from fedgraft.report.table import run_tables

RunSection: TypeAlias = Callable[[Record], Section]
OTHERS = "all other categories"
CATEGORIES = 12  # columns of the data table; beyond, each client's largest categories are named
MODELS = (
    "base is the untouched model, shared has the aggregated leaves alone, trained is the client's model before aggregation, "
    "personal the method's product: the client's own leaves with the aggregated ones."
)


def quality(record: Record) -> Section:
    """How good each client's models are."""
    tables = run_tables(record)
    if record.finished and not record.results:
        text = "Clients keep their figures to themselves under differential privacy, unless the recipe sets privacy.figures."
        return absent("quality", "Quality", text, missing=False)
    if not tables:
        text = f"Not evaluated yet: the figures come after the last round. In the folder of this run, continue with: {RESUME}"
        return absent("quality", "Quality", text)
    blocks: list[Block] = [headline(tables, "models"), Note(text=f"Each client's own {_split(record)} rows; {MODELS}")]
    ends = [name for name in ("base", "personal") if name in tables[0].columns] or tables[0].columns[:2]
    sentence = f"For each client the {tables[0].title} of {' and '.join(ends)}, joined by a line; lower is better."
    rows = {client: {name: row[name] for name in ends if name in row} for client, row in tables[0].clients.items()}
    blocks.append(dots("quality-dots", "What personalisation brings each client", sentence, rows, styles(ends), x_title=tables[0].title))
    blocks.extend(grid(table) for table in tables)
    return Section(name="quality", title="Quality", blocks=blocks)


def data(record: Record) -> Section:
    """Who has what, and which rows were cut."""
    held: Mapping[str, Mapping[str, int]] = record.environment.get("clients", {})
    if not held:
        return absent("data", "Data", "The environment was not written, so nothing is known about the clients' rows.")
    if "privacy" in record.further and not any(held.values()):
        return absent("data", "Data", "How many rows clients have is not told under differential privacy.", missing=False)
    kinds = sorted({kind for counts in held.values() for kind in counts})
    rows, narrow = [], len(kinds) <= CATEGORIES
    for client, counts in held.items():
        shares = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        named = [f"{kind}: {count:,}" for kind, count in shares[:3]] + ([f"{len(shares) - 3} more"] if len(shares) > 3 else [])
        parts = [f"{counts[kind]:,}" if kind in counts else "" for kind in kinds] if narrow else ["; ".join(named)]
        rows.append([client, f"{sum(counts.values()):,}", *parts, *_cut(record, client)])
    columns = ["client", "training rows", *(kinds if narrow else ["largest categories"]), "cut in training", "cut in evaluation"]
    rows, caption = listed(rows, "Training rows of each client by category, and rows cut to the longest length")
    table = Grid(caption=caption, columns=columns, rows=rows)
    longest = record.recipe.get("data", {}).get("max_length", "the longest length")
    text = f"A row of more than {longest} tokens is cut, its context first. Training counts a row each time it is drawn."
    return Section(name="data", title="Data", blocks=[table, partition(held, alone=not narrow), Note(text=text)])


def partition(held: Mapping[str, Mapping[str, int]], *, alone: bool) -> Figure:
    """Who has what, as bars; `alone`: no table with a column for each category stands beside it, so it has the counts itself."""
    kinds = sorted({kind for counts in held.values() for kind in counts})
    totals = {kind: sum(counts.get(kind, 0) for counts in held.values()) for kind in kinds}
    leading = sorted(kinds, key=lambda kind: (-totals[kind], kind))[: STYLES - (len(kinds) > STYLES)]
    rows = {client: {kind: float(counts.get(kind, 0)) for kind in leading} for client, counts in held.items()}
    parts = list(leading)
    if len(kinds) > STYLES:
        parts.append(OTHERS)
        for client, counts in held.items():
            rows[client][OTHERS] = float(sum(counts.values())) - sum(rows[client].values())
    sizes = [sum(counts.values()) for counts in held.values()]
    most, least = max(sizes), min(sizes)
    rows_told = f"{most:,}" if most == least else f"{least:,} to {most:,}"
    single = sum(sum(count > 0 for count in counts.values()) == 1 for counts in held.values())
    text = f"{len(held)} clients with {rows_told} training rows each, of {len(kinds)} categories; {single or 'none'} with a single one."
    told = [[client, *(f"{row[part]:,.0f}" for part in parts)] for client, row in rows.items()]
    told, caption = listed(told, "Training rows by the largest categories")
    table = Grid(caption=caption, columns=["client", *parts], rows=told)
    return stacked(
        "partition",
        "Who has what",
        text,
        rows,
        parts,
        x_title="training rows",
        data=table if alone else None,
    )


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
    known = {name: value for name, value in record.environment.items() if name not in {"schema", "clients", "rows"}}
    if not known:
        return absent("environment", "Environment", "The environment was not written.")
    if len(digests := known.get("client_digests", {})) > LISTED:
        known["client_digests"] = f"of {len(digests)} clients, in environment.json"
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


def _split(record: Record) -> str:
    return str(record.recipe.get("evaluation", {}).get("split", "test"))


def _cut(record: Record, client: str) -> tuple[str, str]:
    """Rows cut in training and, of how many, in evaluation."""
    told = [line["clients"][client] for line in record.rounds if client in line.get("clients", {})]
    trained = [facts["truncated"] for facts in told if "truncated" in facts]
    models = record.results.get(client, {})
    figures: dict[str, Any] = next(iter(models.values()), {})
    evaluated = f"{figures['truncated']:,} of {figures['rows']:,}" if {"truncated", "rows"} <= figures.keys() else "–"
    return (f"{sum(trained):,}" if trained else "–"), evaluated
