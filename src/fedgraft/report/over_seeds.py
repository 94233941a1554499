"""Groups of runs side by side: mean and standard deviation over seeds, and whether a difference is more than chance."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedgraft.plugins import nearest
from fedgraft.report import paired
from fedgraft.report.blocks import Grid, Note, Section
from fedgraft.report.groups import Group, grouped
from fedgraft.report.record import Record
from fedgraft.report.table import described, possible

EXPLANATION = (
    "Mean over the clients' personal models, then mean and sample standard deviation over seeds. Differences are paired by seed. The "
    "paired t test is over seeds, on the means over clients; Wilcoxon's signed-rank test is over seeds x clients, whose pairs are not "
    "independent, since the clients of a run share its leaves. Both are two-sided and take at least 3 seeds, p after Holm for the "
    "comparisons of a table."
)


@dataclass(frozen=True, kw_only=True)
class SeedRow:
    """One group."""

    name: str
    seeds: list[int]
    mean: float
    """Mean over seeds of the mean over clients."""
    std: float | None
    """Sample standard deviation over seeds of the mean over clients; None for one seed."""
    against: paired.Comparison | None
    """None for the reference itself."""


@dataclass(frozen=True, kw_only=True)
class SeedTable:
    """One figure of every group."""

    figure: str
    title: str
    digits: int
    baseline: str
    rows: list[SeedRow]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "figure": self.figure,
            "title": self.title,
            "baseline": self.baseline,
            "correction": "holm",
            "rows": [asdict(row) for row in self.rows],
        }

    @property
    def heading(self) -> str:
        """Figure and reference."""
        return f"{self.title}; differences to {self.baseline}" if len(self.rows) > 1 else self.title

    @property
    def tested(self) -> bool:
        """Whether any row has seeds enough for a test."""
        return any(row.against is not None and row.against.seeds >= paired.FEWEST_SEEDS for row in self.rows)

    @property
    def columns(self) -> list[str]:
        """Headings of `cells`."""
        return ["runs", "seeds", "mean ± std", "difference", *(["paired t, p (seeds)", "Wilcoxon, p (pairs)"] if self.tested else ["test"])]

    def cells(self) -> list[list[str]]:
        """The rows as people read them."""
        return [_cells(row, self.digits, self.tested) for row in self.rows]


def seed_tables(records: Sequence[Record], baseline: str | None = None) -> list[SeedTable]:
    """One table per measured figure; the reference is the group `baseline`, else the first that has the figure.

    Raises:
        ValueError: no group has that name.
    """
    groups = grouped(records)
    names = [group.name for group in groups]
    if baseline is not None and baseline not in names:
        raise ValueError(f"--baseline {baseline}: no such group{nearest(baseline, names)}; there are: {', '.join(names)}")
    tables = [_table(figure, groups, baseline) for figure in possible(records)]
    return [table for table in tables if table.rows]


def several_seeds(records: Sequence[Record]) -> bool:
    """Whether any two of the runs differ only in their seed."""
    return any(len(group.runs) > 1 for group in grouped(records))


def section(records: Sequence[Record], baseline: str | None = None) -> list[Section]:
    """The section of a page; none where no two runs differ only in their seed."""
    if not several_seeds(records):
        return []
    tables = [
        Grid(caption=f"{table.heading} ({_better(table)})", columns=table.columns, rows=table.cells())
        for table in seed_tables(records, baseline)
    ]
    return [Section(name="seeds", title="Over seeds", blocks=[*tables, Note(text=EXPLANATION)])]


def _table(figure: str, groups: Sequence[Group], wanted: str | None) -> SeedTable:
    title, _, digits = described(figure)
    measured = {group.name: values for group in groups if (values := group.by_seed("personal", figure))}
    baseline = wanted or next(iter(measured), "")
    others = [name for name in measured if name != baseline and baseline in measured]
    compared = paired.corrected([paired.compare(measured[name], measured[baseline]) for name in others])
    against = dict(zip(others, compared, strict=True))
    rows = []
    for name, by_seed in measured.items():
        means = [statistics.fmean(clients.values()) for clients in by_seed.values()]
        std = statistics.stdev(means) if len(means) > 1 else None
        rows.append(SeedRow(name=name, seeds=list(by_seed), mean=statistics.fmean(means), std=std, against=against.get(name)))
    return SeedTable(figure=figure, title=title, digits=digits, baseline=baseline, rows=rows)


def _better(table: SeedTable) -> str:
    return "higher is better" if described(table.figure)[1] else "lower is better"


def _cells(row: SeedRow, digits: int, tested: bool) -> list[str]:
    spread = "" if row.std is None else f" ± {row.std:.{digits}f}"
    cells = [row.name, str(len(row.seeds)), f"{row.mean:.{digits}f}{spread}"]
    if row.against is None:
        return [*cells, "–", *["–"] * (1 + tested)]
    difference = "no common seed" if row.against.difference is None else f"{row.against.difference:+.{digits}f}"
    tests = [_p(row.against.t), _p(row.against.wilcoxon)]
    return [*cells, difference, *(tests if tested else tests[:1])]


def _p(test: paired.Verdict) -> str:
    return test.why if test.p is None else f"{'< 0.001' if test.p < 0.001 else f'{test.p:.3f}'} ({test.pairs})"
