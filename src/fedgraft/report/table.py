"""Tables of one run and of several, as plain data that a terminal or a page can draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedgraft.report.groups import grouped
from fedgraft.report.record import Record, gain, summary

FIGURES = {  # figure -> (heading, higher is better, digits)
    "loss": ("response loss (nats/token)", False, 3),
    "token_accuracy": ("token accuracy", True, 3),
    "rougeL": ("ROUGE-L F1 (%)", True, 2),
    "exact_match": ("exact match", True, 3),
    "choice_accuracy": ("choice accuracy", True, 3),
    "choice_accuracy_norm": ("choice accuracy, by length", True, 3),
    "general_loss": ("loss on held-out general text (nats/token)", False, 3),
}
Columns = dict[str, dict[str, float]]
"""Column (or row of a summary) -> client (or column) -> value."""
METRICS = {"acc": "accuracy", "acc_norm": "accuracy by likelihood per character"}
LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "brier_score", "wer", "ter")  # of lm-eval's metrics
FROM, TO = "mean, 95 % from", "mean, 95 % to"
MODELS = ("base", "shared", "trained", "personal")  # as columns from left to right


@dataclass(frozen=True, kw_only=True)
class Table:
    """One figure: rows are clients and their summary, columns are models or runs."""

    figure: str
    title: str
    digits: int
    columns: list[str]
    clients: dict[str, dict[str, float]] = field(default_factory=dict)
    """Client -> column -> value."""
    summary: dict[str, dict[str, float]] = field(default_factory=dict)
    """Row -> column -> value: those of `record.summary`, and where known an interval of the mean and gains over base and local."""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"figure": self.figure, "title": self.title, "columns": self.columns, "clients": self.clients, "summary": self.summary}


def described(figure: str) -> tuple[str, bool, int]:
    """(heading, higher is better, digits) of a figure; those of tasks are called `<task>/<metric>`."""
    if figure in FIGURES:
        return FIGURES[figure]
    task, _, metric = figure.rpartition("/")
    return f"{task}: {METRICS.get(metric, metric)}", not any(word in metric for word in LOWER_IS_BETTER), 3


def possible(records: Sequence[Record]) -> list[str]:
    """The figures there can be: those of every run, then those of the tasks that these were asked."""
    return list(dict.fromkeys(figure for results in ({}, *(record.results for record in records)) for figure in figures_of(results)))


def figures_of(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """The same for figures by client and model."""
    models = [figures for client in results.values() for figures in client.values()]
    return [*FIGURES, *dict.fromkeys(figure for figures in models for figure in figures if "/" in figure)]


def _table(figure: str, columns: Columns, references: Columns | None = None) -> Table:
    """`references`: what gains are told over, by name."""
    title, higher, digits = described(figure)
    columns = {name: values for name, values in columns.items() if values}
    clients = sorted({client for values in columns.values() for client in values})
    sums = {name: summary(values, higher) for name, values in columns.items()}
    rows: Columns = {row: {} for row in ("mean", "std", "worst decile", "worst")}
    for row, told in rows.items():
        told.update({name: sums[name][row] for name in columns if row in sums[name]})
    for reference, values in (references or {}).items():
        gains = {name: gain(own, values, higher) for name, own in columns.items() if own != values}
        rows[f"gain over {reference}"] = {name: mean for name, mean in gains.items() if mean is not None}
    return Table(
        figure=figure,
        title=title,
        digits=digits,
        columns=list(columns),
        clients={client: {name: values[client] for name, values in columns.items() if client in values} for client in clients},
        summary={row: told for row, told in rows.items() if told},
    )


def run_tables(record: Record) -> list[Table]:
    """One table per figure: clients x models of one run."""
    measured = dict.fromkeys(model for client in record.results.values() for model in client)
    models = [*(model for model in MODELS if model in measured), *(model for model in measured if model not in MODELS)]
    tables = []
    for figure in possible([record]):
        table = _table(figure, {model: record.figures(model, figure) for model in models}, {"base": record.figures("base", figure)})
        table.summary.update(_intervals(record, figure, {model: model for model in table.columns}))
        tables.append(table)
    return [table for table in tables if table.columns]


def _intervals(record: Record, figure: str, models: Mapping[str, str]) -> Columns:
    """The ends of the interval of the mean over these clients, whose rows alone were drawn. `models`: column -> model of the record."""
    known = {
        column: record.further.get("summary", {}).get(model, {}).get(figure, {}).get("interval_rows") for column, model in models.items()
    }
    ends = {column: interval for column, interval in known.items() if interval}
    return {row: {column: interval[at] for column, interval in ends.items()} for at, row in enumerate((FROM, TO))} if ends else {}


def further_tables(record: Record) -> list[Table]:
    """The clients x clients matrix and the unseen clients, where they were measured."""
    title = FIGURES["loss"][0]
    tables = []
    if cross := record.further.get("cross"):
        owners = list(dict.fromkeys(owner for losses in cross.values() for owner in losses))
        columns = {owner: {client: losses[owner] for client, losses in cross.items() if owner in losses} for owner in owners}
        tables.append(
            replace(
                _table("loss", columns),
                figure="cross",
                title=f"{title} of the personal model of each client (column) on the rows of each client",
            )
        )
    if unseen := record.further.get("unseen"):
        counts = list(dict.fromkeys(count for by_count in unseen.values() for count in by_count))
        columns = {
            f"{model}, {count} rows": {
                client: by_count[count][model]["loss"] for client, by_count in unseen.items() if model in by_count.get(count, {})
            }
            for model in MODELS
            for count in (counts if model != "base" else counts[:1])
        }
        tables.append(replace(_table("loss", columns), figure="unseen", title=f"{title} of clients that the federation never asked"))
    return [table for table in tables if table.columns]


def compare_tables(records: Sequence[Record]) -> list[Table]:
    """One table per figure: clients x runs, the base model first; each run is its `personal` model.

    Runs that differ only in their seed are one column, a client's value being its mean over the seeds; the others have their interval.
    """
    groups = grouped(records)
    local = next((group for group in groups if group.runs[0].method == "local"), None)
    tables = []
    for figure in possible(records):
        base = next((values for group in groups if (values := group.figures("base", figure))), {})
        references = {"base": base, **({"local": local.figures("personal", figure)} if local is not None else {})}
        table = _table(figure, {"base": base, **{group.name: group.figures("personal", figure) for group in groups}}, references)
        ends: Columns = {FROM: {}, TO: {}}
        for group in groups:
            if len(group.runs) == 1:  # of several seeds no interval over rows is known
                for row, told in _intervals(group.runs[0], figure, {group.name: "personal"}).items():
                    ends[row].update(told)
        table.summary.update({row: told for row, told in ends.items() if told})
        tables.append(table)
    return [table for table in tables if table.columns]


def cost(record: Record) -> dict[str, Any]:
    """Bytes, tokens and seconds of a run: in all, those after the last round included, and the bytes of a mean round.

    Tokens are None where clients do not tell of them.
    """
    rounds, everything = record.rounds, [*record.rounds, *record.finishes]
    return {
        "rounds": len(rounds),
        "bytes_up": sum(line["bytes_up"] for line in everything),
        "bytes_down": sum(line["bytes_down"] for line in everything),
        "bytes_up_per_round": round(sum(line["bytes_up"] for line in rounds) / max(1, len(rounds))),
        "bytes_down_per_round": round(sum(line["bytes_down"] for line in rounds) / max(1, len(rounds))),
        "training_tokens": None if any(line["tokens"] is None for line in everything) else sum(line["tokens"] for line in everything),
        "training_seconds": round(sum(line["seconds"] for line in everything), 2),
    }
