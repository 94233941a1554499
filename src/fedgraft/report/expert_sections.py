"""Sections of one run's page about its grafted experts and about its cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedgraft.report.blocks import Block, Facts, Figure, Grid, Note, Section
from fedgraft.report.figures import Series, curves
from fedgraft.report.heat_map import Shade, heat_map
from fedgraft.report.record import Record
from fedgraft.report.shaping import RESUME, absent, number, span_of
from fedgraft.report.table import cost

Experts = Sequence[Sequence[int]]
Numbers = Sequence[Sequence[float]]


def experts(record: Record) -> Section:
    """Which expert each client grew its graft from, and how well it stands in for the routed output."""
    title = "Chosen experts"
    if "graft" not in record.recipe:
        text = f"Method {record.method!r} grafts no expert, so there is no choice to show."
        return absent("experts", title, text, missing=False)
    if not record.selection:
        text = f"No client has chosen its experts yet. In the folder of this run, continue with: {RESUME}"
        return absent("experts", title, text)
    chosen = {client: facts["experts"] for client, facts in record.selection.items()}
    errors = {client: facts["errors"] for client, facts in record.selection.items() if facts.get("errors")}
    settings = record.recipe.get("selection", {})
    tokens = sorted({int(facts["calibration_tokens"]) for facts in record.selection.values() if "calibration_tokens" in facts})
    seen = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}" if tokens else "unknown"
    blocks: list[Block] = [Facts(items=[("criterion", str(settings.get("criterion", "unknown"))), ("calibration tokens per client", seen)])]
    blocks.append(_choice(chosen, errors))
    if errors:
        blocks.append(_errors(chosen, errors))
    return Section(name="experts", title=title, blocks=blocks)


def gates(record: Record) -> Section:
    """How far each graft's gate opens on its client's own rows."""
    title = "Gates"
    if "graft" not in record.recipe:
        return absent("gates", title, f"Method {record.method!r} has no grafted expert and no gate.", missing=False)
    personal = {client: models.get("personal", {}) for client, models in record.results.items()}
    means: dict[str, Numbers] = {client: figures["gate_mean"] for client, figures in personal.items() if "gate_mean" in figures}
    if not means:
        text = "Gates are measured with the personal models, after the last round; this record has no such figure."
        return absent("gates", title, f"{text} In the folder of this run, continue with: {RESUME}")
    values = [value for layers in means.values() for layer in layers for value in layer]
    high = max(values)
    figure = heat_map(
        "gate-means",
        "Mean gate",
        f"Between {min(values):.3f} and {high:.3f} over {len(means)} clients and their layers.",
        _shades(means, lambda value: Shade(text=f"{value:.2f}", level=value / high if high else 0.0, exact=f"{value:.3f}")),
        scale=("0", f"{high:.2f}"),
        caption="Mean of sigmoid(g·x) over the tokens of the client's evaluation rows: 0 leaves the graft out, 1 adds it whole.",
    )
    return Section(name="gates", title=title, blocks=[figure])


def traffic_and_time(record: Record) -> Section:
    """Bytes, seconds and tokens."""
    title = "Cost"
    if not record.rounds:
        return absent("cost", title, f"No round is finished yet. In the folder of this run, continue with: {RESUME}")
    total = cost(record)
    seconds = total["training_seconds"]
    facts = Facts(
        items=[
            ("bytes up, all clients", f"{total['bytes_up'] / 1e6:,.2f} MB"),
            ("bytes down, all clients", f"{total['bytes_down'] / 1e6:,.2f} MB"),
            ("training tokens", f"{total['training_tokens']:,}"),
            ("training time", f"{seconds:,.1f} s"),
            ("tokens per second", f"{total['training_tokens'] / seconds:,.0f}" if seconds else "–"),
        ]
    )
    text = "Bytes are those of the encoded packages and replies (fp32), as they would cross a wire. Seconds are wall clock and vary."
    return Section(name="cost", title=title, blocks=[facts, _bytes(record), _seconds(record), _speed(record), Note(text=text)])


def _shades(values: Mapping[str, Sequence[Sequence[Any]]], shade: Callable[[Any], Shade]) -> dict[str, list[list[Shade]]]:
    """Client -> [L][r] of a value -> the same of its shade."""
    return {client: [[shade(value) for value in layer] for layer in layers] for client, layers in values.items()}


def _choice(chosen: Mapping[str, Experts], errors: Mapping[str, Numbers]) -> Figure:
    known = [len(layer) - 1 for layers in errors.values() for layer in layers]
    last = max([expert for layers in chosen.values() for layer in layers for expert in layer] + known)
    layers = list(zip(*chosen.values(), strict=True))
    agreed = sum(all(choice == layer[0] for choice in layer) for layer in layers)
    return heat_map(
        "chosen-experts",
        "Chosen expert",
        f"Source expert of every graft. The {len(chosen)} clients agree in {agreed} of {len(layers)} MoE layers.",
        _shades(chosen, lambda expert: Shade(text=str(expert), level=expert / last if last else 0.0, exact=str(expert))),
        scale=("expert 0", f"expert {last}"),
        caption="A column of one colour is a layer in which they agree.",
    )


def _errors(chosen: Mapping[str, Experts], errors: Mapping[str, Numbers]) -> Figure:
    """The relative error of each chosen expert; its rank among all experts of the layer stands in the table."""
    found = {client: _ranked(chosen[client], errors[client]) for client in errors}
    values = [value for layers in found.values() for layer in layers for value in layer]
    low, high = min(error for error, _ in values), max(error for error, _ in values)
    first = sum(rank == 1 for _, rank in values)

    def shade(value: tuple[float, int]) -> Shade:
        error, rank = value
        return Shade(text=f"{error:.2f}", level=(error - low) / (high - low) if high > low else 0.0, exact=f"{error:.3f} (rank {rank})")

    return heat_map(
        "choice-errors",
        "Relative reconstruction error of the choice",
        f"Between {low:.3f} and {high:.3f}; a choice has the lowest error of its layer in {first} of {len(values)} cases.",
        _shades(found, shade),
        scale=(f"{low:.2f}", f"{high:.2f}"),
        caption="It is ||R − E||² / ||R||² of the routed output R and the chosen expert E on the calibration text.",
    )


def _ranked(chosen: Experts, errors: Numbers) -> list[list[tuple[float, int]]]:
    """(error, its rank in the layer from 1 up) of every chosen expert, [L][r]."""
    return [
        [(layer_errors[expert], 1 + sum(error < layer_errors[expert] for error in layer_errors)) for expert in layer]
        for layer, layer_errors in zip(chosen, errors, strict=True)
    ]


def _bytes(record: Record) -> Figure:
    lines = [(line["round"] + 1, line["bytes_up"] / 1e6, line["bytes_down"] / 1e6) for line in record.rounds]
    return curves(
        "bytes",
        "Bytes per round",
        f"In the last round {lines[-1][1]:.2f} MB went up and {lines[-1][2]:.2f} MB down, all clients together.",
        [
            Series(label="down", style="s0", points=[(at, down) for at, _, down in lines]),
            Series(label="up", style="s5", points=[(at, up) for at, up, _ in lines]),
        ],
        Grid(
            caption="MB per round", columns=["round", "up", "down"], rows=[[str(at), f"{up:.3f}", f"{down:.3f}"] for at, up, down in lines]
        ),
        x_title="round",
        y_title="MB, all clients",
        x=span_of(record),
        zero=True,
    )


def _seconds(record: Record) -> Figure:
    points = [(line["round"] + 1, number(line.get("seconds"))) for line in record.rounds]
    return curves(
        "seconds",
        "Seconds per round",
        f"The last round took {points[-1][1]:.1f} seconds.",
        [Series(label="seconds", style="s0", points=points)],
        Grid(caption="Seconds per round", columns=["round", "seconds"], rows=[[str(at), f"{value:.2f}"] for at, value in points]),
        x_title="round",
        y_title="seconds",
        x=span_of(record),
        zero=True,
    )


def _speed(record: Record) -> Figure:
    speeds = [
        (line["round"] + 1, line["tokens"], line["tokens"] / line["seconds"] if line["seconds"] else float("nan")) for line in record.rounds
    ]
    return curves(
        "speed",
        "Tokens per second",
        f"In the last round {speeds[-1][1]:,} tokens.",
        [Series(label="tokens per second", style="s0", points=[(at, speed) for at, _, speed in speeds])],
        Grid(
            caption="Tokens per round and per second",
            columns=["round", "tokens", "tokens per second"],
            rows=[[str(at), f"{tokens:,}", f"{speed:,.0f}"] for at, tokens, speed in speeds],
        ),
        x_title="round",
        y_title="tokens per second",
        x=span_of(record),
        zero=True,
    )
