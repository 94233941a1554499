"""What the figures of all clients come to: the section `summary` of `results.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedgraft import intervals, seeds
from fedgraft.report.record import gain, summary
from fedgraft.report.table import described, figures_of

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]


def summarise(results: Results, seed: int, resamples: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Model -> figure -> what the clients' values come to.

    `clients` (how many have it), `mean`, `std`, `worst`, with more than ten clients `worst decile` (the mean of the worst tenth);
    `gain_over_base`, the mean over clients of how much better than the base, where that was measured; and intervals of the mean at 95 %,
    null where there is none: `interval_rows` for these clients and other rows of theirs, `interval_clients` for other clients.
    """
    models = list(dict.fromkeys(model for client in results.values() for model in client))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for model in models:
        for figure in ("gain", *figures_of(results)):
            higher = figure == "gain" or described(figure)[1]
            values = _values(results, model, figure)
            if values:
                rng = seeds.numpy_rng(seed, "bootstrap of clients", figure)
                base = {} if model == "base" else _values(results, "base", figure)
                found.setdefault(model, {})[figure] = {
                    "clients": len(values),
                    **summary(values, higher),
                    **({"gain_over_base": gains} if (gains := gain(values, base, higher)) is not None else {}),
                    "interval_rows": _of_rows(results, model, figure, values),
                    "interval_clients": intervals.bootstrap(list(values.values()), None, rng, resamples),
                }
    return found


def _values(results: Results, model: str, figure: str) -> dict[str, float]:
    return {client: models[model][figure] for client, models in results.items() if figure in models.get(model, {})}


def _of_rows(results: Results, model: str, figure: str, values: Mapping[str, float]) -> intervals.Interval | None:
    """From the intervals of the clients, whose rows are independent of each other's."""
    each = [results[client][model].get("interval", {}).get(figure) for client in values]
    return intervals.of_mean(list(values.values()), each)
