"""Membership inference on finished runs: who was in the training rows of a model? Fills a section of docs/privacy.md.

    python -m tools.leakage --section leakage --rows 60 runs/main/fedavg_seed-* runs/main/flex_seed-*

Members are training rows of a client that its batches really held, non-members its validation and test rows. Two attacks, whose scores are
higher for a member: `loss`, the negative loss of a row (Yeom et al. 2018), and `calibrated`, by how much the loss lies below that of the
base, which saw no row (difficulty calibration, Watson et al. 2022; the likelihood ratio of Carlini et al. 2022 with one reference model).
Models: `sent`, a client's shared leaves after its last training, as the coordinator gets them; `shared`, the aggregate; `personal`, the
client's whole model; `base` shows that the rows alone tell nothing. A table's row is the mean ± sample standard deviation over clients
and seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from fedgraft import load
from fedgraft.bundle import Bundle
from fedgraft.data.batches import round_rows
from fedgraft.data.example import Example
from fedgraft.data.partition import ClientData, load_clients
from fedgraft.evaluation.response import response_sums
from fedgraft.methods.method import Prediction
from fedgraft.recipe import Recipe, load_recipe
from fedgraft.report.record import Record
from fedgraft.training.client import Client, MemoryStore
from fedgraft.tree import equal
from tools.results import differences, written

DOCUMENT = Path("docs/privacy.md")
ATTACKS = ("loss", "calibrated")
LEVELS = (0.01, 0.1)
Scores = NDArray[np.float64]


def auc(members: Scores, others: Scores) -> float:
    """The chance that a member's score is above a non-member's, ties half: the rank sum identity (Mann and Whitney 1947)."""
    ranks = rankdata(np.concatenate([members, others]))[: len(members)]
    return float((ranks.sum() - len(members) * (len(members) + 1) / 2) / (len(members) * len(others)))


def true_positives(members: Scores, others: Scores, level: float) -> float:
    """The largest share of members above a threshold that at most the share `level` of the non-members is above."""
    threshold = np.sort(others)[::-1][int(level * len(others))]
    return float((members > threshold).mean())


def trained_rows(client: ClientData, recipe: Recipe) -> list[Example]:
    """The training rows that the client's batches held, in the order of the client's rows."""
    whole = recipe.training.steps * recipe.training.batch_size
    seen: set[int] = set()
    for number in range(recipe.federation.rounds):
        seen |= {int(index) for index in round_rows(len(client.train), whole, number, recipe.seed, client.name)}
    return [client.train[index] for index in sorted(seen)]


def models(folder: Path, client: str, loaded: Any) -> dict[str, Prediction]:
    """What is attacked of one client."""
    state = Bundle.load(folder / "state" / "state.safetensors")
    asked: Any = state.facts["asked"]
    sent = MemoryStore(folder / "clients").load(client, asked).tree("trained")
    found = {"sent": Prediction(tree=sent, experts=[])} if sent else {}
    for name, title in (("shared", "shared"), (client, "personal")):
        if name in loaded.models:
            found[title] = loaded.prediction(name)
    if "shared" in found and equal(found["personal"].tree, found["shared"].tree):
        del found["personal"]  # nothing is the client's own
    return found


def attacked(folder: Path, most: int) -> dict[tuple[str, str], list[tuple[float, ...]]]:
    """(model, attack) -> for every client (AUC, true positives at each of `LEVELS`)."""
    recipe, found = load_recipe(folder / "recipe.yaml"), defaultdict(list)
    loaded = load(folder)
    for data in load_clients(recipe.data, recipe.seed):
        others = [*data.test, *data.validation][:most]
        rows = [*trained_rows(data, recipe)[:most], *others]
        client = Client(
            data=data,
            model=loaded.grafted,
            seed=recipe.seed,
            data_settings=recipe.data,
            training=recipe.training,
            selection=recipe.selection,
        )

        def losses(model: Prediction, client: Client = client, rows: Sequence[Example] = rows) -> Scores:
            sums = response_sums(client, model, rows, 8)[1]
            return sums.nats / np.maximum(1, sums.tokens)

        base = losses(Prediction(tree={}, experts=[]))
        scores = {("base", "loss"): -base}  # what a model that saw none of them tells: that members are no easier
        for name, model in models(folder, data.name, loaded).items():
            own = losses(model)
            scores |= {(name, attack): score for attack, score in zip(ATTACKS, (-own, base - own), strict=True)}
        for key, score in scores.items():
            inside, outside = score[: -len(others)], score[-len(others) :]
            found[key].append((auc(inside, outside), *(true_positives(inside, outside, level) for level in LEVELS)))
    return found


def table(by_label: Mapping[str, Mapping[tuple[str, str], Sequence[tuple[float, ...]]]]) -> str:
    """Markdown."""
    heads = ["AUC", *(f"members found at {level:.0%} false alarms" for level in LEVELS)]
    lines = ["| run | model | attack | values | " + " | ".join(heads) + " |", "|---" * (4 + len(heads)) + "|"]
    for label, found in by_label.items():
        for (model, attack), values in found.items():
            cells = [f"{statistics.fmean(column):.3f} ± {statistics.stdev(column):.3f}" for column in zip(*values, strict=True)]
            lines.append(f"| {label} | {model} | {attack} | {len(values)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--section", required=True, help="name of the markers in docs/privacy.md")
    parser.add_argument("--rows", type=int, default=100, help="most members, and most non-members, of a client")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folders = [folder for folder in options.runs if (folder / "results.json").is_file()]
    by_label: dict[str, dict[tuple[str, str], list[tuple[float, ...]]]] = {}
    for folder, label in zip(folders, differences([Record.load(folder).recipe for folder in folders]), strict=True):
        for key, values in attacked(folder, options.rows).items():
            by_label.setdefault(label, {}).setdefault(key, []).extend(values)
    written(DOCUMENT, options.section, table(by_label))


if __name__ == "__main__":
    main()
