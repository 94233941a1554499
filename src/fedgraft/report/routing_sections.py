"""Sections of one run's page about what gates and routers do, beside the untouched base."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedgraft.report.bars import histogram
from fedgraft.report.blocks import Block, Figure, Grid, Note, Section
from fedgraft.report.figures import Series, curves
from fedgraft.report.heat_map import Shade, Sides, heat_map
from fedgraft.report.record import Record
from fedgraft.report.shaping import RESUME, absent, percents

Figures = Mapping[str, Mapping[str, Any]]
"""Client -> what `evaluation.experts` measured."""
TENTHS = [f"{tenth / 10:.1f}" for tenth in range(10)]


def gates(record: Record) -> Section:
    """How far each graft's gate opens on its client's own rows, and where the graft outweighs the routed experts."""
    title = "Gates"
    if "graft" not in record.recipe:
        return absent("gates", title, f"Method {record.method!r} has no grafted expert and no gate.", missing=False)
    measured = {client: figures for client, figures in record.further.get("experts", {}).items() if figures.get("gate_mean")}
    personal = {client: models.get("personal", {}) for client, models in record.results.items()}
    means = {client: figures["gate_mean"] for client, figures in {**personal, **measured}.items() if "gate_mean" in figures}
    if not means:
        text = "Gates are measured with the personal models, after the last round; this record has no such figure."
        return absent("gates", title, f"{text} In the folder of this run, continue with: {RESUME}")
    blocks: list[Block] = [_means(means)]
    if measured:
        blocks += [_dominates(measured), *_histograms(measured)]
    else:
        text = "How the gates of single tokens spread, and where the graft dominates, was not measured: evaluation.experts was off."
        blocks.append(Note(text=text))
    return Section(name="gates", title=title, blocks=blocks)


def routing(record: Record) -> Section:
    """Which experts the frozen routers take, and how far that has moved from the base."""
    title, found = "Routing", record.further.get("experts", {})
    if not record.finished:
        text = f"Routing is looked at after the last round. In the folder of this run, continue with: {RESUME}"
        return absent("routing", title, text)
    if not found:
        return absent("routing", title, "What the routers do was not measured: evaluation.experts was off.", missing=False)
    tokens = sum(figures["tokens"] for figures in found.values())
    text = (
        f"Of the personal models on {tokens:,} tokens of the clients' first rows. Routers are frozen; what they are given changes with the "
        "adapters and grafts of the layers below."
    )
    lines = [
        _layers(
            found,
            "balance",
            "Balance of the experts",
            "entropy / maximum",
            "Entropy of their shares over its maximum: 1 when all are chosen equally often.",
        ),
        _layers(
            found,
            "token_entropy",
            "Entropy of a token's weights",
            "entropy / maximum",
            "Of its chosen experts, over its maximum; 0 when one takes all.",
        ),
        _layers(
            found,
            "agreement",
            "Choices that stay the same",
            "share",
            "Share of a token's experts that base and personal model both choose.",
        ),
        _layers(
            found,
            "drift",
            "Drift of the experts' inputs",
            "1 − cosine",
            "1 − cosine between the inputs of base and personal model, mean over tokens.",
        ),
    ]
    return Section(name="routing", title=title, blocks=[Note(text=text), *lines, _utilisation(found), _apart(found)])


def _means(means: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    values = [value for layers in means.values() for layer in layers for value in layer]
    high = max(values)

    def shade(value: float) -> Shade:
        return Shade(text=f"{value:.2f}", level=value / high if high else 0.0, exact=f"{value:.3f}")

    return heat_map(
        "gate-means",
        "Mean gate",
        f"Between {min(values):.3f} and {high:.3f} over {len(means)} clients and their layers.",
        {client: [[shade(value) for value in layer] for layer in layers] for client, layers in means.items()},
        scale=("0", f"{high:.2f}"),
        caption="Mean of sigmoid(g·x) over the tokens of the client's evaluation rows: 0 leaves the graft out, 1 adds it whole.",
    )


def _dominates(measured: Figures) -> Figure:
    shares = {client: figures["dominates"] for client, figures in measured.items()}
    values = [share for layers in shares.values() for share in layers]
    high = max(values)
    return heat_map(
        "graft-dominates",
        "Tokens that the graft dominates",
        f"{100 * statistics.fmean(values):.1f} % on average, {100 * high:.1f} % at most.",
        {client: [[_share(share, high)] for share in layers] for client, layers in shares.items()},
        scale=("0 %", f"{100 * high:.0f} %"),
        caption="Share of tokens to which the grafts of a layer add more, by norm, than its routed experts; in per cent.",
    )


def _histograms(measured: Figures) -> list[Block]:
    """Over all, by client, and by layer; layers and grafts count alike."""
    by_client = {client: gate_tenths(figures) for client, figures in measured.items()}
    layers = next(iter(measured.values()))["graft_layers"]
    by_layer = {
        f"layer {layer}": _mean(graft for figures in measured.values() for graft in figures["gate_histogram"][at])
        for at, layer in enumerate(layers)
    }
    overall = _mean(by_client.values())
    ends = [(min(shares), max(shares)) for shares in zip(*by_client.values(), strict=True)]
    rows = [
        [f"{name} to {(at + 1) / 10:.1f}", percents(share), percents(low), percents(high)]
        for at, (name, share, (low, high)) in enumerate(zip(TENTHS, overall, ends, strict=True))
    ]
    open_wide = sum(overall[5:])
    drawn = histogram(
        "gate-histogram",
        "Gates of single tokens",
        f"{100 * open_wide:.1f} % of the tokens open their gate further than half. Lines go from the lowest client to the highest.",
        overall,
        ends,
        Grid(caption="Share of tokens by tenths of the gate", columns=["gate", "mean", "lowest client", "highest client"], rows=rows),
        x_title="gate",
    )
    return [drawn, tenths("client", "clients", by_client), tenths("layer", "layers", by_layer)]


def gate_tenths(figures: Mapping[str, Any]) -> list[float]:
    """Share of a client's tokens by tenths of the gate; layers and grafts count alike."""
    return _mean(graft for layer in figures["gate_histogram"] for graft in layer)


def tenths(row: str, rows: str, shares: Mapping[str, Sequence[float]]) -> Figure:
    """Tenths of the gate as columns; `shares` of each row."""
    high = max(share for row_shares in shares.values() for share in row_shares)
    return heat_map(
        f"gates-by-{row}",
        f"Gates of single tokens by {row}",
        f"Shares of tokens for {len(shares)} {row if len(shares) == 1 else rows}.",
        {name: [[_share(share, high)] for share in row_shares] for name, row_shares in shares.items()},
        scale=("0 %", f"{100 * high:.0f} %"),
        caption="In per cent; the columns are named by the gate they begin with.",
        sides=Sides(row=row, rows=rows, column="tenth of the gate", columns="tenths of the gate", names=TENTHS),
    )


def _layers(found: Figures, figure: str, title: str, unit: str, caption: str) -> Figure:
    """A figure of the router by MoE layer: its mean and range over clients, and the base where it has a value of its own."""
    layers = next(iter(found.values()))["layers"]
    both = isinstance(next(iter(found.values()))[figure], Mapping)
    sides = {side: [figures[figure][side] for figures in found.values()] for side in ("base", "personal")} if both else {}
    values = {side: _mean(each) for side, each in (sides or {"personal": [figures[figure] for figures in found.values()]}).items()}
    personal = [figures[figure]["personal"] if both else figures[figure] for figures in found.values()]
    band = [(min(each), max(each)) for each in zip(*personal, strict=True)]
    means = values["personal"]
    low, high = min(range(len(means)), key=means.__getitem__), max(range(len(means)), key=means.__getitem__)
    series = [
        Series(
            label=side,
            style="base" if side == "base" else "s0",
            points=list(zip(layers, each, strict=True)),
            band=[] if side == "base" else band,
        )
        for side, each in values.items()
    ]
    rows = [
        [str(layer), *(f"{each[at]:.4f}" for each in values.values()), *(f"{end:.4f}" for end in band[at])]
        for at, layer in enumerate(layers)
    ]
    return curves(
        f"routing-{figure.replace('_', '-')}",
        title,
        f"From {means[low]:.3f} in layer {layers[low]} to {means[high]:.3f} in layer {layers[high]}, mean over clients.",
        series,
        Grid(caption=f"{title} by layer", columns=["layer", *values, "lowest client", "highest client"], rows=rows),
        x_title="layer",
        y_title=unit,
        x=(layers[0], layers[-1]),
        caption=f"{caption} Shaded: from the lowest client to the highest.",
    )


def _utilisation(found: Figures) -> Figure:
    layers = next(iter(found.values()))["layers"]
    base, personal = (
        [_mean(figures["utilisation"][side][at] for figures in found.values()) for at in range(len(layers))]
        for side in ("base", "personal")
    )
    high = max(share for row in personal for share in row)
    moved = statistics.fmean(sum(abs(a - b) for a, b in zip(*pair, strict=True)) / 2 for pair in zip(base, personal, strict=True))
    return heat_map(
        "utilisation",
        "Utilisation of the experts",
        f"{100 * moved:.1f} % of the choices have moved to another expert, net, mean over layers. The busiest takes {100 * high:.1f} %.",
        {
            f"layer {layer}": [[_share(share, high, before)] for before, share in zip(base[at], personal[at], strict=True)]
            for at, layer in enumerate(layers)
        },
        scale=("0 %", f"{100 * high:.0f} %"),
        caption="Share of a layer's choices that fall on each expert, in per cent, mean over clients; the table has base → personal.",
        sides=Sides(row="layer", rows="layers", column="expert", columns="routed experts"),
    )


def _apart(found: Figures) -> Figure:
    """Clients x experts, in the layer where the clients' shares differ most."""
    layers = next(iter(found.values()))["layers"]
    use = {client: figures["utilisation"]["personal"] for client, figures in found.items()}
    spread = [
        sum(statistics.pstdev(shares) for shares in zip(*(rows[at] for rows in use.values()), strict=True)) for at in range(len(layers))
    ]
    at = max(range(len(layers)), key=spread.__getitem__)
    high = max(share for rows in use.values() for share in rows[at])
    return heat_map(
        "utilisation-by-client",
        f"Experts that each client's tokens take in layer {layers[at]}",
        "The layer in which the clients differ most." if len(use) > 1 else "The first layer.",
        {
            client: [
                [_share(share, high, before)] for before, share in zip(found[client]["utilisation"]["base"][at], rows[at], strict=True)
            ]
            for client, rows in use.items()
        },
        scale=("0 %", f"{100 * high:.0f} %"),
        caption="Share of the layer's choices in per cent; the table has base → personal.",
        sides=Sides(column="expert", columns="routed experts"),
    )


def _share(share: float, high: float, before: float | None = None) -> Shade:
    exact = percents(share) if before is None else f"{percents(before)} → {percents(share)}"
    return Shade(text=f"{100 * share:.0f}", level=share / high if high else 0.0, exact=exact)


def _mean(rows: Any) -> list[float]:
    """Of rows of equal length, value by value."""
    return [statistics.fmean(values) for values in zip(*rows, strict=True)]
