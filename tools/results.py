"""Summarise runs over seeds into a section of docs/results.md.

    python tools/results.py --section main-job runs/main/*
    python tools/results.py --section rows --pivot data.train_rows --figure loss --beside local runs/rows/*

    python tools/results.py --section ablations --variants flex runs/ablations/*
    python tools/results.py --document docs/reliability.md --section attackers --pivot attack --common runs/robustness/*

Runs that differ only in their seed are one row; with `--variants` rows are named as the sweep named them; with `--pivot` the values of one
recipe key, or of a whole section, are the columns of a table of one figure.
Every figure is mean ± sample standard deviation over seeds of the mean over clients of the `personal` model on the split the runs were
evaluated on. The text between the section's markers is replaced.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from fedgraft import files
from fedgraft.report.groups import SEED
from fedgraft.report.record import Record, summary
from fedgraft.report.table import FIGURES, cost

DOCUMENT = Path("docs/results.md")


def differences(recipes: list[dict[str, Any]], pivot: str = "") -> list[str]:
    """A label per recipe: the method and every setting, seed, evaluation and `pivot` excepted, in which the recipes differ."""
    flat = [dict(_flatten(recipe)) for recipe in recipes]
    skipped = {"seed", "method.name", pivot}
    left_out = ("evaluation.", f"{pivot}.") if pivot else ("evaluation.",)
    keys = sorted(key for key in {key for values in flat for key in values} - skipped if not key.startswith(left_out))
    labels = []
    for values in flat:
        same_method = [other for other in flat if other["method.name"] == values["method.name"]]
        telling = [key for key in keys if len({json.dumps(other.get(key)) for other in same_method}) > 1]
        labels.append(", ".join([str(values["method.name"]), *(f"{key}={values[key]}" for key in telling if key in values)]))
    return labels


def _flatten(values: dict[str, Any], head: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs += _flatten(value, f"{head}{key}.") if isinstance(value, dict) else [(f"{head}{key}", value)]
    return pairs


def _value(recipe: dict[str, Any], key: str) -> Any:
    """What a recipe says under a key; of a section all that it says, as text."""
    flat = dict(_flatten(recipe))
    inside = sorted(flat, key=lambda name: name != f"{key}.name")  # its name first, the others as they stand
    return flat[key] if key in flat else " ".join(str(flat[name]) for name in inside if name.startswith(f"{key}."))


def spread(values: list[float], digits: int) -> str:
    """`mean ± std` over seeds; of one seed the value."""
    told = f"{statistics.fmean(values):.{digits}f}"
    return f"{told} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else told


def section(records: list[Record]) -> str:
    """A Markdown table of mean figures and one of response loss per client."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for label, record in zip(differences([record.recipe for record in records]), records, strict=True):
        groups[label].append(record)
    shown = [figure for figure in FIGURES if any(record.figures("personal", figure) for record in records)]
    clients = sorted({client for record in records for client in record.results})
    rows = [("base", "base", measured)] if (measured := [record for record in records if record.figures("base", "loss")]) else []
    rows += [(label, "personal", group) for label, group in groups.items()]
    lines = [
        "| run | seeds | " + " | ".join(FIGURES[figure][0] for figure in shown) + " | MB up a round |",
        "|---" * (len(shown) + 3) + "|",
    ]
    for label, model, group in rows:
        cells = []
        for figure in shown:
            values = [summary(found, True)["mean"] for record in group if (found := record.figures(model, figure))]
            cells.append(spread(values, FIGURES[figure][2]) if values else "-")
        sent = "-" if model == "base" else f"{statistics.fmean(cost(record)['bytes_up_per_round'] for record in group) / 1e6:.2f}"
        lines.append(f"| {label} | {len({record.recipe['seed'] for record in group})} | " + " | ".join(cells) + f" | {sent} |")
    lines += ["", "Response loss per client:", "", "| run | " + " | ".join(clients) + " |", "|---" * (len(clients) + 1) + "|"]
    for label, model, group in rows:
        cells = [spread([found[client] for record in group if (found := record.figures(model, "loss"))], 3) for client in clients]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pivoted(records: list[Record], key: str, figure: str, beside: str = "", common: bool = False) -> str:
    """A Markdown table of one figure: a row per method and further settings, a column per value of the recipe's `key`.

    With `beside`, a method, cells say in brackets how much they are above its runs of the same seeds, mean ± deviation of the differences.
    With `common`, means are over those clients that all runs of a seed have evaluated.
    """
    seeds = {record.recipe["seed"] for record in records}
    shared = {seed: set[str].intersection(*({*record.results} for record in records if record.recipe["seed"] == seed)) for seed in seeds}
    groups: dict[tuple[str, Any], dict[int, float]] = defaultdict(dict)
    labels = differences([record.recipe for record in records], key)
    for label, record in zip(labels, records, strict=True):
        for row, model in ((label, "personal"), ("base", "base")):
            found = record.figures(model, figure)
            if common:
                found = {client: value for client, value in found.items() if client in shared[record.recipe["seed"]]}
            if found:
                groups[row, _value(record.recipe, key)][record.recipe["seed"]] = summary(found, True)["mean"]
    columns, digits = sorted({value for _, value in groups}, key=lambda value: (value != "none", value)), FIGURES[figure][2]
    counts = {len(by_seed) for by_seed in groups.values()}
    head = f"{FIGURES[figure][0]}, seeds: {' or '.join(map(str, sorted(counts)))}, by {key}"
    lines = [f"| {head} | " + " | ".join(map(str, columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    rows = [row for row in dict.fromkeys(("base", *labels)) if any((row, value) in groups for value in columns)]
    for row in rows:
        cells = [_cell(groups.get((row, value), {}), groups.get((beside, value), {}) if row != beside else {}, digits) for value in columns]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def variants(records: list[Record], beside: str) -> str:
    """A Markdown table: a row for each variant of a sweep, the lowest loss first, with differences by seed to the variant `beside`."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[SEED.sub("", record.folder.name)].append(record)
    shown = ("loss", "token_accuracy", "general_loss")
    means = {
        (name, figure): {
            record.recipe["seed"]: summary(found, True)["mean"] for record in group if (found := record.figures("personal", figure))
        }
        for name, group in groups.items()
        for figure in shown
    }
    lines = [f"| variant | seeds | {' | '.join(FIGURES[figure][0] for figure in shown)} |", "|---" * (len(shown) + 2) + "|"]
    for name in sorted(groups, key=lambda name: statistics.fmean(means[name, "loss"].values())):
        cells = [_cell(means[name, figure], means[beside, figure] if name != beside else {}, FIGURES[figure][2]) for figure in shown]
        lines.append(f"| {name} | {len(groups[name])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(own: dict[int, float], other: dict[int, float], digits: int) -> str:
    if not own:
        return "-"
    above = [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]
    sign = "+" if above and statistics.fmean(above) >= 0 else ""
    return spread(list(own.values()), digits) + (f" ({sign}{spread(above, digits)})" if above else "")


def written(document: Path, section: str, table: str) -> None:
    """Put a table between the markers of its section."""
    begin, end = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    text = document.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise SystemExit(f"{document} has no markers for section {section!r}")
    before, rest = text.split(begin, 1)
    files.write_text(document, f"{before}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--section", required=True, help="name of the markers <!-- NAME: begin --> and <!-- NAME: end --> in the document")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help=f"where the section stands ({DOCUMENT})")
    parser.add_argument("--variants", metavar="NAME", help="name rows as the sweep did, with differences to this variant, paired by seed")
    parser.add_argument("--pivot", metavar="KEY", help="a key or section whose values are the columns, such as data.train_rows")
    parser.add_argument("--beside", metavar="METHOD", default="", help="with --pivot: also differences to this method, paired by seed")
    parser.add_argument("--figure", default="loss", choices=sorted(FIGURES), help="what a table with --pivot shows")
    parser.add_argument("--common", action="store_true", help="with --pivot: only clients that all runs of a seed have evaluated")
    options = parser.parse_args()
    records = [Record.load(folder) for folder in options.runs if (folder / "results.json").is_file()]
    if options.variants:
        table = variants(records, options.variants)
    else:
        table = pivoted(records, options.pivot, options.figure, options.beside, options.common) if options.pivot else section(records)
    written(options.document, options.section, table)


if __name__ == "__main__":
    main()
