"""The section of one run's page about its training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedgraft.report.blocks import Grid, Section
from fedgraft.report.figures import STYLES, Series, curves
from fedgraft.report.record import Record
from fedgraft.report.shaping import RESUME, WITHHELD, absent, mean_losses, number, span_of, value

FULL_CURVES = 20_000  # values of all clients' curves; beyond, their range stands for them


def training(record: Record) -> Section:
    """Training loss of every client, and the learning rate."""
    title, rounds = "Training", record.rounds
    if rounds and "privacy" in rounds[-1]:
        return absent("training", title, f"{WITHHELD} So there is no curve.", missing=False)
    if not any(line.get("loss") is not None for line in rounds):
        reason = "No round is finished yet" if not rounds else "Nobody trained in the rounds that are done"
        return absent("training", title, f"{reason}, so there is no curve. In the folder of this run, continue with: {RESUME}")
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
        _from_to(rates, "{:.3g}") + ".",
        [Series(label="learning rate", style="s0", points=rates)],
        Grid(caption="Learning rate", columns=["round", "learning rate"], rows=[[str(at), f"{value:.3g}"] for at, value in rates]),
        x_title="round",
        y_title="learning rate",
        x=span,
        zero=True,
    )
    return Section(name="training", title=title, blocks=[loss, rate])


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
    losses = _finite(line)
    return (losses[0], losses[-1]) if losses else (math.nan, math.nan)


def _finite(line: Mapping[str, Any]) -> list[float]:
    """The clients' losses of a round, ascending."""
    return sorted(loss for facts in line.get("clients", {}).values() if math.isfinite(loss := number(facts.get("loss"))))


def _loss_sentence(record: Record) -> str:
    means = [(at, value) for at, value in mean_losses(record) if math.isfinite(value)]
    return f"The mean over clients: {_from_to(means, '{:.3f}')}."


def _from_to(points: Sequence[tuple[float, float]], digits: str) -> str:
    told = [f"{digits.format(value)} in round {at:g}" for at, value in points]
    return told[0] if len(told) == 1 else f"{told[0]}, {told[-1]}"


def _loss_grid(record: Record) -> Grid:
    """Rounds x clients, or the spread over clients where that would be endless."""
    losses = _client_losses(record)
    if len(losses) <= STYLES:
        by_round = {client: dict(points) for client, points in losses.items()}
        columns = ["round", "mean", *losses]
        rows = [[f"{at:g}", f"{mean:.3f}", *(value(points, at, 3) for points in by_round.values())] for at, mean in mean_losses(record)]
        return Grid(caption="Training loss per round and client", columns=columns, rows=rows)
    rows = []
    for line in record.rounds:
        now = _finite(line)
        spread = [now[0], statistics.median(now), now[-1]] if now else [math.nan] * 3
        rows.append([str(line["round"] + 1), *(f"{loss:.3f}" for loss in (number(line.get("loss")), *spread)), str(len(now))])
    return Grid(
        caption="Training loss per round over clients", columns=["round", "mean", "lowest", "median", "highest", "clients"], rows=rows
    )
