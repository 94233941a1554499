"""Sections of a page about several runs: their experts, whose models help whom, unseen clients, who has what, what they ran on."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fedgraft.report.blocks import Block, Facts, Figure, Grid, Note, Section
from fedgraft.report.figures import curves
from fedgraft.report.groups import Group, grouped, labels
from fedgraft.report.record import Record
from fedgraft.report.routing_sections import gate_tenths, tenths
from fedgraft.report.sections import partition
from fedgraft.report.seed_spread import caption, ends, over_seeds, series, told
from fedgraft.report.shaping import MANY, absent, flat, shown
from fedgraft.report.table import FIGURES
from fedgraft.report.transfer_sections import Apart, matrix

OWN = ("schema", "command", "started", "run", "clients", "client_digests", "data_digest")
"""Of an environment: what belongs to a run or its data, not to what it ran on."""


def experts(records: Sequence[Record]) -> Section:
    """What gates, grafts and routers do in the runs that measured it, in numbers and by layer."""
    title, groups = "Experts and routing", [(group, found) for group in grouped(records) if (found := _found(group))]
    if not groups:
        return absent("experts", title, "In none of these runs was it measured what the experts do (evaluation.experts).", missing=False)
    columns = ["run", "mean gate", "tokens that the graft dominates", "balance in base", "balance", "same choices", "drift of inputs"]
    rows = [[group.name, *_numbers(found)] for group, found in groups]
    text = (
        "Means over clients, layers and seeds. Balance is the entropy of the experts' shares over its maximum; same choices: the share of "
        "a token's experts that base and personal model both choose; drift: 1 − cosine between the inputs of their experts."
    )
    drift = _by_layer(groups, "drift", "Drift of the experts' inputs", "1 − cosine")
    same = _by_layer(groups, "agreement", "Choices that stay the same", "share")
    grid = Grid(caption="Gates, grafts and routers", columns=columns, rows=rows)
    opened = {group.name: shares for group, found in groups if (shares := _gates(found))}
    spread: list[Block] = [tenths("run", "runs", opened)] if opened else []
    return Section(name="experts", title=title, blocks=[grid, Note(text=text), *spread, drift, same])


def others(records: Sequence[Record]) -> Section:
    """Do the clients' personal models help each other? A matrix for each run, mean over its seeds; of many runs numbers alone."""
    title = "Each other's models"
    found = {group.name: losses for group in grouped(records) if (losses := _mean_losses(group))}
    if not found:
        text = "In none of these runs were clients' models tried on each other's rows (evaluation.cross)."
        return absent("others", title, text, missing=False)
    apart = {name: Apart(losses=losses) for name, losses in found.items()}
    rows = [
        [name, f"{one.best} of {len(one.losses)}", "–" if one.foreign is None else f"{one.foreign:+.3f}"] for name, one in apart.items()
    ]
    columns = ["run", "clients whose own model is the best", "another's loss less the own (nats/token)"]
    matrices = [matrix(losses, f"cross-{at}", of=name) for at, (name, losses) in enumerate(found.items())] if len(found) <= MANY else []
    text = "The matrix of each run is on its own page." if not matrices else "Losses are means over seeds."
    return Section(
        name="others", title=title, blocks=[Grid(caption="Own and others' models", columns=columns, rows=rows), Note(text=text), *matrices]
    )


def unseen(records: Sequence[Record]) -> Section:
    """What clients get that the federations never asked, by the rows they adapt with."""
    title, found = "Unseen clients", {}
    for group in grouped(records):
        means = [_means_by_rows(record.further["unseen"], "personal") for record in group.runs if record.further.get("unseen")]
        if any(means):
            found[group.name] = over_seeds(means)
    if not found:
        return absent("unseen", title, "None of these runs held a client out (evaluation.unseen.clients).", missing=False)
    counts = sorted({count for by_rows in found.values() for count in by_rows})
    lost = {name: values[max(values)][0] for name, values in found.items()}
    rows = [[name, *(told(values, count) for count in counts)] for name, values in found.items()]
    figure = curves(
        "unseen-curve",
        "Unseen clients adapting the shared leaves",
        f"With the most rows, {ends(lost)}.",
        series(found),
        Grid(
            caption=f"{FIGURES['loss'][0]} by training rows adapted with",
            columns=["run", *(f"{count:g} rows" for count in counts)],
            rows=rows,
        ),
        x_title="training rows adapted with",
        y_title=FIGURES["loss"][0],
        x=(counts[0], counts[-1]),
        caption=caption(found),
    )
    return Section(name="unseen", title=title, blocks=[figure])


def data(records: Sequence[Record]) -> Section:
    """Who has what, drawn where it is the same in all runs."""
    known = [(name, held) for name, record in zip(labels(records), records, strict=True) if (held := record.environment.get("clients"))]
    if not known:
        return absent("data", "Data", "No environment was written, so nothing is known about the clients' rows.")
    first = known[0][1]
    if all(held == first for _, held in known):
        note = "All runs have the same clients with the same numbers of rows."
        return Section(name="data", title="Data", blocks=[Note(text=note), partition(first, alone=True)])
    rows = []
    for name, held in known:
        sizes = [sum(counts.values()) for counts in held.values()]
        kinds = statistics.fmean(sum(count > 0 for count in counts.values()) for counts in held.values())
        rows.append([name, str(len(held)), f"{sum(sizes):,}", f"{min(sizes):,}", f"{max(sizes):,}", f"{kinds:.1f}"])
    columns = ["run", "clients", "training rows", "fewest of a client", "most of a client", "categories of a client"]
    text = "The runs divide their rows differently; the page of each has the picture."
    return Section(name="data", title="Data", blocks=[Grid(caption="Who has what", columns=columns, rows=rows), Note(text=text)])


def environment(records: Sequence[Record]) -> Section:
    """What the runs ran on: what they have in common, then what differs."""
    known = [
        (name, dict(flat({key: value for key, value in record.environment.items() if key not in OWN})))
        for name, record in zip(labels(records), records, strict=True)
        if record.environment
    ]
    if not known:
        return absent("environment", "Environment", "No environment was written.")
    keys = list(dict.fromkeys(key for _, values in known for key in values))
    apart = [key for key in keys if len({shown(values.get(key, "–")) for _, values in known}) > 1]
    blocks: list[Block] = [Facts(items=[(key, shown(known[0][1][key])) for key in keys if key not in apart])]
    if apart:
        rows = [[name, *(shown(values[key]) if key in values else "–" for key in apart)] for name, values in known]
        blocks.append(Grid(caption="What differs", columns=["run", *apart], rows=rows, numeric=False))
    return Section(name="environment", title="Environment", blocks=blocks)


def _found(group: Group) -> list[Mapping[str, Mapping[str, Any]]]:
    """Of each seed that measured it: client -> what `evaluation.experts` gave."""
    return [record.further["experts"] for record in group.runs if record.further.get("experts")]


def _gates(found: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[float]:
    """Share of tokens by tenths of the gate, mean over seeds and clients; nothing where there are no gates."""
    shares = [gate_tenths(figures) for run in found for figures in run.values() if figures.get("gate_histogram")]
    return [statistics.fmean(values) for values in zip(*shares, strict=True)]


def _mean_losses(group: Group) -> dict[str, dict[str, float]]:
    """Client -> model -> response loss, mean over the seeds that have it."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in group.runs:
        for client, row in record.further.get("cross", {}).items():
            for owner, loss in row.items():
                found.setdefault(client, {}).setdefault(owner, []).append(loss)
    return {client: {owner: statistics.fmean(losses) for owner, losses in row.items()} for client, row in found.items()}


def _numbers(found: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[str]:
    clients = [figures for run in found for figures in run.values()]
    gates = [gate for figures in clients for layer in figures.get("gate_mean", []) for gate in layer]
    shares = [share for figures in clients for share in figures.get("dominates", [])]
    balance = [[statistics.fmean(figures["balance"][side]) for figures in clients] for side in ("base", "personal")]
    others = [[statistics.fmean(figures[name]) for figures in clients] for name in ("agreement", "drift")]
    return [
        f"{statistics.fmean(gates):.3f}" if gates else "–",
        f"{100 * statistics.fmean(shares):.2f} %" if shares else "–",
        *(f"{statistics.fmean(values):.4f}" for values in (*balance, *others)),
    ]


def _by_layer(groups: Sequence[tuple[Group, list[Mapping[str, Mapping[str, Any]]]]], figure: str, title: str, unit: str) -> Figure:
    found = {group.name: over_seeds([_means_by_layer(run, figure) for run in runs]) for group, runs in groups}
    layers = sorted({layer for values in found.values() for layer in values})
    means = {name: statistics.fmean(mean for mean, _, _ in values.values()) for name, values in found.items()}
    rows = [[f"{layer:g}", *(told(values, layer, 4) for values in found.values())] for layer in layers]
    return curves(
        f"experts-{figure}",
        title,
        f"Mean over layers: {ends(means, 4)}.",
        series(found),
        Grid(caption=f"{title} by layer", columns=["layer", *found], rows=rows, sortable=False),
        x_title="layer",
        y_title=unit,
        x=(layers[0], layers[-1]),
        caption=caption(found),
    )


def _means_by_layer(run: Mapping[str, Mapping[str, Any]], figure: str) -> dict[float, float]:
    layers = next(iter(run.values()))["layers"]
    return {layer: statistics.fmean(figures[figure][at] for figures in run.values()) for at, layer in enumerate(layers)}


def _means_by_rows(clients: Mapping[str, Mapping[str, Any]], model: str) -> dict[float, float]:
    """Rows adapted with -> mean over the unseen clients of the loss of a model."""
    values: dict[float, list[float]] = {}
    for by_count in clients.values():
        for count, models in by_count.items():
            if model in models:
                values.setdefault(float(count), []).append(models[model]["loss"])
    return {count: statistics.fmean(values[count]) for count in sorted(values)}
