"""Sections of one run's page about its grafted experts and about its cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedgraft.report.blocks import Block, Facts, Figure, Grid, Note, Section
from fedgraft.report.figures import Series, Shade, curves, heat_map
from fedgraft.report.record import Record
from fedgraft.report.sections import RESUME, number, span_of
from fedgraft.report.table import cost

Numbers = Sequence[Sequence[float]]


def experts(record: Record) -> Section:
    """Which expert each client grew its graft from, and how well it stands in for the routed output."""
    title = "Chosen experts"
    if "graft" not in record.recipe:
        text = f"Method {record.method!r} grafts no expert, so there is no choice to show."
        return Section(name="experts", title=title, blocks=[Note(text=text)])
    if not record.selection:
        text = f"No client has chosen its experts yet. In the folder of this run, continue with: {RESUME}"
        return Section(name="experts", title=title, blocks=[Note(text=text, missing=True)])
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
        return Section(name="gates", title=title, blocks=[Note(text=f"Method {record.method!r} has no grafted expert and no gate.")])
    personal = {client: models.get("personal", {}) for client, models in record.results.items()}
    means: dict[str, Numbers] = {client: figures["gate_mean"] for client, figures in personal.items() if "gate_mean" in figures}
    if not means:
        text = "Gates are measured with the personal models, after the last round; this record has no such figure."
        return Section(
            name="gates", title=title, blocks=[Note(text=f"{text} In the folder of this run, continue with: {RESUME}", missing=True)]
        )
    values = [value for layers in means.values() for layer in layers for value in layer]
    high = max(values)
    figure = heat_map(
        "gate-means",
        "Mean gate",
        f"Between {min(values):.3f} and {high:.3f} over {len(means)} clients and their layers.",
        {
            client: [[Shade(text=f"{v:.2f}", level=v / high if high else 0.0) for v in layer] for layer in layers]
            for client, layers in means.items()
        },
        _layers("Mean gate", {client: [[f"{v:.3f}" for v in layer] for layer in layers] for client, layers in means.items()}),
        columns="MoE layers",
        scale=("0", f"{high:.2f}"),
        caption="Mean of sigmoid(g·x) over the tokens of the client's evaluation rows: 0 leaves the graft out, 1 adds it whole. "
        "Rows are clients, columns are MoE layers.",
    )
    return Section(name="gates", title=title, blocks=[figure])


def traffic_and_time(record: Record) -> Section:
    """Bytes, seconds and tokens."""
    title, rounds = "Cost", record.rounds
    if not rounds:
        return Section(name="cost", title=title, blocks=[Note(text=f"No round is finished yet. Continue with: {RESUME}", missing=True)])
    up, down = sum(line["bytes_up"] for line in rounds), sum(line["bytes_down"] for line in rounds)
    total = cost(record)
    seconds = total["training_seconds"]
    facts = Facts(
        items=[
            ("bytes up, all clients", f"{up / 1e6:,.2f} MB"),
            ("bytes down, all clients", f"{down / 1e6:,.2f} MB"),
            ("training tokens", f"{total['training_tokens']:,}"),
            ("training time", f"{seconds:,.1f} s"),
            ("tokens per second", f"{total['training_tokens'] / seconds:,.0f}" if seconds else "–"),
        ]
    )
    text = "Bytes are those of the encoded packages and replies (fp32), as they would cross a wire. Seconds are wall clock and vary."
    return Section(name="cost", title=title, blocks=[facts, _bytes(record), _seconds(record), _speed(record), Note(text=text)])


def _choice(chosen: Mapping[str, Any], errors: Mapping[str, Numbers]) -> Figure:
    highest = max(expert for layers in chosen.values() for layer in layers for expert in layer)
    last = max(highest, *(len(layer) - 1 for layers in errors.values() for layer in layers)) if errors else highest
    split = max(len(layer) for layers in chosen.values() for layer in layers)
    shared = sum(len({str(layers[at]) for layers in chosen.values()}) == 1 for at in range(len(next(iter(chosen.values())))))
    count = len(next(iter(chosen.values())))
    return heat_map(
        "chosen-experts",
        "Chosen expert" if split == 1 else "Chosen experts",
        f"Source expert of every graft for {len(chosen)} clients and {count} MoE layers. All clients agree in {shared} of the layers.",
        {
            client: [[Shade(text=str(expert), level=expert / last if last else 0.0) for expert in layer] for layer in layers]
            for client, layers in chosen.items()
        },
        _layers("Chosen expert", {client: [[str(expert) for expert in layer] for layer in layers] for client, layers in chosen.items()}),
        columns="MoE layers",
        scale=("expert 0", f"expert {last}"),
        caption="Rows are clients, columns are MoE layers; a column of one colour is a layer in which the clients agree.",
    )


def _errors(chosen: Mapping[str, Any], errors: Mapping[str, Numbers]) -> Figure:
    """The relative error of each chosen expert; its rank among all experts of the layer stands in the table."""
    found = {
        client: [[(errors[client][at][expert], 1 + sum(e < errors[client][at][expert] for e in errors[client][at])) for expert in layer]
                 for at, layer in enumerate(layers)]
        for client, layers in chosen.items()
        if client in errors
    }  # fmt: skip
    values = [error for layers in found.values() for layer in layers for error, _ in layer]
    low, high = min(values), max(values)
    first = sum(rank == 1 for layers in found.values() for layer in layers for _, rank in layer)
    return heat_map(
        "choice-errors",
        "Relative reconstruction error of the choice",
        f"Between {low:.3f} and {high:.3f}; the chosen expert has the lowest error of its layer in {first} of {len(values)} choices.",
        {
            client: [
                [Shade(text=f"{error:.2f}", level=(error - low) / (high - low) if high > low else 0.0) for error, _ in layer]
                for layer in layers
            ]
            for client, layers in found.items()
        },
        _layers(
            "Relative reconstruction error, and its rank among the experts of the layer",
            {client: [[f"{error:.3f} (rank {rank})" for error, rank in layer] for layer in layers] for client, layers in found.items()},
        ),
        columns="MoE layers",
        scale=(f"{low:.2f}", f"{high:.2f}"),
        caption="It is ||R − E||² / ||R||² of the routed output R and the chosen expert E on the calibration text. "
        "Rows are clients, columns are MoE layers.",
    )


def _layers(caption: str, cells: Mapping[str, Sequence[Sequence[str]]]) -> Grid:
    count = max(len(layers) for layers in cells.values())
    rows = [[client, *(", ".join(layer) for layer in layers)] for client, layers in cells.items()]
    return Grid(caption=f"{caption} per client and MoE layer", columns=["client", *map(str, range(count))], rows=rows)


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
