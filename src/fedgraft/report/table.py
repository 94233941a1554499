"""Tables of one run and of several, as plain data that a terminal or a page can draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedgraft.report.groups import grouped
from fedgraft.report.record import Record, summary

FIGURES = {  # figure -> (heading, higher is better, digits)
    "loss": ("response loss (nats/token)", False, 3),
    "token_accuracy": ("token accuracy", True, 3),
    "rougeL": ("ROUGE-L F1 (%)", True, 2),
    "general_loss": ("loss on held-out general text (nats/token)", False, 3),
}
METRICS = {"acc": "accuracy", "acc_norm": "accuracy by likelihood per character"}
LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "brier_score", "wer", "ter")  # of lm-eval's metrics
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
    """mean, std, worst -> column -> value."""

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
    models = [figures for record in records for client in record.results.values() for figures in client.values()]
    return [*FIGURES, *dict.fromkeys(figure for figures in models for figure in figures if "/" in figure)]


def _table(figure: str, columns: dict[str, dict[str, float]]) -> Table:
    title, higher, digits = described(figure)
    columns = {name: values for name, values in columns.items() if values}
    clients = sorted({client for values in columns.values() for client in values})
    sums = {name: summary(values, higher) for name, values in columns.items()}
    return Table(
        figure=figure,
        title=title,
        digits=digits,
        columns=list(columns),
        clients={client: {name: values[client] for name, values in columns.items() if client in values} for client in clients},
        summary={row: {name: sums[name][row] for name in columns} for row in ("mean", "std", "worst")},
    )


def run_tables(record: Record) -> list[Table]:
    """One table per figure: clients x models of one run."""
    measured = dict.fromkeys(model for client in record.results.values() for model in client)
    models = [*(model for model in MODELS if model in measured), *(model for model in measured if model not in MODELS)]
    tables = [_table(figure, {model: record.figures(model, figure) for model in models}) for figure in possible([record])]
    return [table for table in tables if table.columns]


def compare_tables(records: Sequence[Record]) -> list[Table]:
    """One table per figure: clients x runs, the base model first; each run is its `personal` model.

    Runs that differ only in their seed are one column, a client's value being its mean over the seeds.
    """
    groups = grouped(records)
    tables = []
    for figure in possible(records):
        base = next((values for group in groups if (values := group.figures("base", figure))), {})
        tables.append(_table(figure, {"base": base, **{group.name: group.figures("personal", figure) for group in groups}}))
    return [table for table in tables if table.columns]


def cost(record: Record) -> dict[str, Any]:
    """Bytes, tokens and seconds of a run, from its round lines."""
    rounds = record.rounds
    return {
        "rounds": len(rounds),
        "bytes_up_per_round": round(sum(line["bytes_up"] for line in rounds) / max(1, len(rounds))),
        "bytes_down_per_round": round(sum(line["bytes_down"] for line in rounds) / max(1, len(rounds))),
        "training_tokens": sum(line["tokens"] for line in rounds),
        "training_seconds": round(sum(line["seconds"] for line in rounds), 2),
    }
