"""The page of a run and of a comparison: one file that needs no network, made from records alone.

Its one script (`assets/report/page.js`) is written into it, and the page's policy lets no other run. The same record gives the same bytes,
and nothing in a run's page depends on where its folder lies.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from fedgraft import files
from fedgraft.report import (
    comparison,
    cost_sections,
    expert_sections,
    over_seeds,
    routing_sections,
    sections,
    side_by_side,
    training_sections,
    transfer_sections,
)
from fedgraft.report.blocks import Facts, Page
from fedgraft.report.lines import left_since
from fedgraft.report.record import Record, check_one_split
from fedgraft.report.shaping import budget, shown

if TYPE_CHECKING:
    from jinja2 import Environment

NAME = "report.html"
MARK = '<meta name="generator" content="fedgraft report">'
RUN: tuple[sections.RunSection, ...] = (
    sections.quality,
    training_sections.training,
    expert_sections.experts,
    routing_sections.gates,
    routing_sections.routing,
    transfer_sections.others,
    transfer_sections.unseen,
    sections.data,
    cost_sections.traffic_and_time,
    sections.settings,
    sections.environment,
    sections.reproduce,
)
COMPARISON: tuple[comparison.ComparisonSection, ...] = (
    comparison.runs,
    comparison.quality,
    comparison.training,
    side_by_side.experts,
    side_by_side.others,
    side_by_side.unseen,
    side_by_side.data,
    comparison.price,
    comparison.differences,
    side_by_side.environment,
    comparison.reproduce,
)


def run_page(record: Record) -> str:
    """The page of one run, however far it has come."""
    model = str(record.recipe.get("model", {}).get("name", "unknown model"))
    planned, done = record.recipe.get("federation", {}).get("rounds", "?"), len(record.rounds)
    unseen = len(record.further.get("unseen", {}).keys() - record.results.keys())
    clients = len(record.environment.get("clients", {})) - unseen or len(record.results or record.selection)
    items = [
        ("state", "finished" if record.finished else "stopped before its end" if done else "stopped before its first round"),
        ("clients", f"{clients}{f', and {unseen} unseen' if unseen else ''}" if clients else "unknown"),
        ("rounds", f"{done} of {planned}"),
        ("seed", shown(record.recipe.get("seed"))),
        ("started", str(record.environment.get("started", "unknown"))),
        ("digest", record.digest[:16] or "none before the end"),
    ]
    left = left_since(record.rounds) | record.further.get("left", {})
    items += [("left the federation", ", ".join(f"{name} before round {number + 1}" for name, number in left.items()))] if left else []
    spent = record.rounds[-1].get("privacy") if record.rounds else None
    items += [("privacy spent", budget(spent))] if spent else []
    dataset = shown(record.recipe.get("data", {}).get("dataset"))
    lead = f"One federated run of the method {record.method} on the base model {Path(model).name} with the data set {dataset}."
    return render(
        Page(
            title=f"{record.method} on {Path(model).name}",
            lead=lead,
            facts=Facts(items=items),
            sections=[make(record) for make in RUN],
        )
    )


def comparison_page(records: Sequence[Record], baseline: str | None = None) -> str:
    """The page of several runs; `baseline` names the runs that the others are tested against, the first ones without it.

    Raises:
        ValueError: there are no runs of that name, or some were evaluated on rows of another split.
    """
    check_one_split(records)
    methods = list(dict.fromkeys(record.method for record in records))
    clients = sorted({len(record.results) for record in records if record.results})
    items = [
        ("runs", str(len(records))),
        ("finished", str(sum(record.finished for record in records))),
        ("clients", " / ".join(map(str, clients)) or "unknown"),
    ]
    return render(
        Page(
            title=f"{len(records)} run{'' if len(records) == 1 else 's'} compared",
            lead=f"Federated runs side by side: {', '.join(methods)}.",
            facts=Facts(items=items),
            sections=[*over_seeds.section(records, baseline), *(make(records) for make in COMPARISON)],
        )
    )


def render(page: Page) -> str:
    """The document of a page."""
    style, script = (_asset(name) for name in ("style.css", "page.js"))
    digest = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _templates().get_template("page.html.j2").render(page=page, style=style, script=script, script_digest=digest, mark=MARK)


def write_page(path: Path, document: str) -> None:
    """Write a page atomically; an older page of ours is replaced, anything else is left alone.

    Raises:
        ValueError: the file exists and is no report of fedgraft.
    """
    if path.exists() and not (path.is_file() and MARK.encode() in path.read_bytes()[:4096]):
        raise ValueError(f"{path}: exists and is no report of fedgraft, so it is not overwritten; move it away or choose another file")
    files.write_text(path, document)


def leave_page(folder: Path) -> None:
    """Write the page of a run into its folder. For the end of a run, whatever it was: a failure is logged, never raised.

    So is an impatient second Ctrl-C, which must not hide that the first one left a run to be resumed.
    """
    try:
        write_page(folder / NAME, run_page(Record.load(folder)))
    except (Exception, KeyboardInterrupt) as error:
        reason = str(error) or type(error).__name__
        logging.getLogger(__name__).warning("%s was not written (%s); the run itself is not affected", folder / NAME, reason)


def _asset(name: str) -> str:
    return (resources.files("fedgraft") / "assets" / "report" / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("fedgraft", "assets/report")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
