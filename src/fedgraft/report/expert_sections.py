"""The section of one run's page about the experts that its clients grafted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedgraft.report.blocks import Block, Facts, Figure, Section
from fedgraft.report.heat_map import Shade, heat_map
from fedgraft.report.record import Record
from fedgraft.report.shaping import RESUME, absent

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
