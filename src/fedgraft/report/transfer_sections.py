"""Sections of one run's page about models on others' rows: every client's on every other's, and the shared leaves at unseen clients."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedgraft.report.blocks import Block, Figure, Section
from fedgraft.report.figures import Series, curves
from fedgraft.report.heat_map import Shade, Sides, heat_map
from fedgraft.report.record import Record
from fedgraft.report.shaping import RESUME, absent, grid
from fedgraft.report.table import FIGURES, further_tables

Losses = Mapping[str, Mapping[str, float]]


def others(record: Record) -> Section:
    """Does a client's personal model help the others?"""
    title, losses = "Each other's models", record.further.get("cross", {})
    losses = {client: row for client, row in losses.items() if row}
    if not record.finished and record.recipe.get("evaluation", {}).get("cross"):
        text = (
            f"The clients' models are tried on each other's rows after the last round. In the folder of this run, continue with: {RESUME}"
        )
        return absent("others", title, text)
    if not losses:
        text = "Not tried on each other's rows: evaluation.cross was off, or the method's models cannot be lent."
        return absent("others", title, text, missing=False)
    return Section(name="others", title=title, blocks=[matrix(losses)])


def unseen(record: Record) -> Section:
    """What clients get that the federation never asked."""
    title, found = "Unseen clients", record.further.get("unseen", {})
    if not record.finished and record.recipe.get("evaluation", {}).get("unseen", {}).get("clients"):
        text = f"Clients that were held out are met after the last round. In the folder of this run, continue with: {RESUME}"
        return absent("unseen", title, text)
    tables = [table for table in further_tables(record) if table.figure == "unseen"]
    if not tables:
        return absent("unseen", title, "No client was held out of the federation (evaluation.unseen.clients).", missing=False)
    curve = {
        client: {int(count): models["personal"]["loss"] for count, models in by_count.items() if "personal" in models}
        for client, by_count in found.items()
    }
    base = [next(iter(by_count.values())).get("base", {}).get("loss") for by_count in found.values()]
    blocks: list[Block] = []
    if all(curve.values()):
        blocks.append(_adapting(curve, [loss for loss in base if loss is not None]))
    return Section(name="unseen", title=title, blocks=[*blocks, *(grid(table, "model, rows") for table in tables)])


@dataclass(frozen=True, kw_only=True)
class Apart:
    """How far clients' models are from each other on each other's rows, `losses` of at least one client."""

    losses: Losses

    @property
    def more(self) -> dict[str, dict[str, float]]:
        """Client -> model -> its loss less that of the client's own (of the best one where the own was not lent)."""
        reference = {client: row.get(client, min(row.values())) for client, row in self.losses.items()}
        return {client: {owner: loss - reference[client] for owner, loss in row.items()} for client, row in self.losses.items()}

    @property
    def best(self) -> int:
        """On the rows of how many clients their own model is the best."""
        return sum(client in row and row[client] == min(row.values()) for client, row in self.losses.items())

    @property
    def foreign(self) -> float | None:
        """Mean distance of another client's model from the own (nats/token); None where nobody has tried one."""
        values = [value for client, row in self.more.items() for owner, value in row.items() if owner != client]
        return statistics.fmean(values) if values else None


def matrix(losses: Losses, name: str = "cross", of: str = "") -> Figure:
    """Rows x models, coloured by how much worse than the client's own model each is, which rows of different difficulty have in common.

    `of`: the runs it is of, on a page about several.
    """
    apart = Apart(losses=losses)
    owners, more, foreign = list(dict.fromkeys(owner for row in losses.values() for owner in row)), apart.more, apart.foreign
    low, high = (end(value for row in more.values() for value in row.values()) for end in (min, max))

    def shade(client: str, owner: str) -> list[Shade]:
        if owner not in losses[client]:
            return [Shade(text="–", level=float("nan"), exact="–")]
        value = more[client][owner]
        level = (value - low) / (high - low) if high > low else 0.0
        return [Shade(text=f"{value:+z.2f}", level=level, exact=f"{losses[client][owner]:.3f}")]

    mean = "" if foreign is None else f"; another client's is {foreign:+.3f} nats/token from it on average"
    return heat_map(
        name,
        "Response loss of each client's personal model on each client's rows" + (f", {of}" if of else ""),
        f"On the rows of {apart.best} of {len(losses)} clients their own model is the best{mean}.",
        {client: [shade(client, owner) for owner in owners] for client in losses},
        scale=(f"{low:+z.2f}", f"{high:+z.2f}"),
        caption="Fields have the difference to the client's own model (nats/token, below 0 is better), the table the losses.",
        sides=Sides(row="client", rows="clients whose rows they are", column="model", columns="clients whose model it is", names=owners),
    )


def _adapting(curve: Mapping[str, Mapping[int, float]], base: Sequence[float]) -> Figure:
    counts = sorted({count for losses in curve.values() for count in losses})
    means = [(count, statistics.fmean(losses[count] for losses in curve.values() if count in losses)) for count in counts]
    clients = [
        Series(label="a client" if not at else "", style="many", points=sorted(losses.items())) for at, losses in enumerate(curve.values())
    ]
    untouched = (
        [Series(label="base", style="base", points=[(count, statistics.fmean(base)) for count in (counts[0], counts[-1])])] if base else []
    )
    told = [f"{loss:.3f} with {count} row{'' if count == 1 else 's'}" for count, loss in means]
    return curves(
        "unseen-curve",
        "Unseen clients adapting the shared leaves",
        f"The mean over {len(curve)} client{'' if len(curve) == 1 else 's'}: {', '.join(told)}.",
        [
            *untouched,
            *(clients if len(curve) > 1 else []),
            Series(label="mean" if len(curve) > 1 else "personal", style="mean", points=means),
        ],
        None,
        x_title="training rows adapted with",
        y_title=FIGURES["loss"][0],
        x=(counts[0], counts[-1]),
    )
