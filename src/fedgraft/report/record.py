"""The record of a run, read from its folder alone."""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedgraft import files
from fedgraft.yaml_text import read_written

SCHEMA = 1
SWEEP = "sweep.json"
FURTHER = ("summary", "experts", "unseen", "cross", "left", "privacy")
FINISH = "finish.json"
COST = "cost.json"
CHOICE = ("experts", "errors", "calibration_tokens")
"""What is kept of a client's choice of experts."""
QUOTE = shlex.quote if os.name == "posix" else lambda word: subprocess.list2cmdline([word])  # as the shell at hand reads it


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run left behind; parts that it has not reached are empty."""

    folder: Path
    recipe: dict[str, Any]
    environment: dict[str, Any]
    rounds: list[dict[str, Any]]
    finishes: list[dict[str, Any]]
    """What was done once after the last round, for every length that the run has had: round, seconds, tokens, bytes_down, bytes_up."""
    selection: dict[str, Any]
    """Client -> {experts [L][r], errors [L][E], calibration_tokens}; of one whose first reply was lost the experts alone."""
    results: dict[str, Any]
    """Client -> model -> figure -> value."""
    digest: str
    further: dict[str, Any] = field(default_factory=dict)
    """The other parts of `results.json`, where there: `summary`, `experts`, `unseen`, `cross`; `left`: withdrawn client -> first round
    without it; `privacy`: what was spent."""
    spending: dict[str, Any] = field(default_factory=dict)
    """`account`: what is trained and what a token costs; `sessions`: each that ended in order, how far it came (`rounds`, `finished`),
    its `seconds` by phase and peaks of memory."""
    split: str = ""
    """Which rows the figures are of, as `results.json` says: `validation` or `test`; empty before the end."""

    @staticmethod
    def load(folder: Path | str) -> Record:
        """Read a run folder.

        Raises:
            ValueError: it is no run folder, or a file in it is damaged or newer than this fedgraft.
        """
        folder = Path(folder)
        if not (folder / "recipe.yaml").is_file():
            raise ValueError(f"{folder}: not a run folder (it has no recipe.yaml)")
        recipe, results = read_recipe(folder / "recipe.yaml"), read_document(folder / "results.json")
        finished = results.get("rounds") == recipe["federation"]["rounds"]  # else they are older than an extension of the run
        return Record(
            folder=folder,
            recipe=recipe,
            environment=read_document(folder / "environment.json"),
            rounds=files.read_lines(folder / "rounds.jsonl"),
            finishes=read_document(folder / FINISH).get("finishes", []),
            selection=read_document(folder / "selection.json").get("clients", {}),
            results=results["clients"] if finished else {},
            digest=files.read_text(folder / "digest.txt").strip() if finished else "",
            spending=read_document(folder / COST),
            further={part: results[part] for part in FURTHER if part in results} if finished else {},
            split=str(results.get("split", "")) if finished else "",
        )

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.recipe["method"]["name"])

    @property
    def finished(self) -> bool:
        """All rounds done and evaluated."""
        return bool(self.digest)

    def figures(self, model: str, figure: str) -> dict[str, float]:
        """Client -> value of one figure of one model, where measured."""
        return {client: models[model][figure] for client, models in self.results.items() if figure in models.get(model, {})}


def summary(values: dict[str, float], higher_is_better: bool) -> dict[str, float]:
    """Mean, standard deviation over clients (sample form; 0 for one client) and the worst client's value.

    Of more than ten clients also the mean of the worst tenth of them, rounded up.
    """
    numbers = sorted(values.values(), reverse=not higher_is_better)  # the worst first
    tenth = numbers[: -(-len(numbers) // 10)]
    return {
        "mean": statistics.fmean(numbers),
        "std": statistics.stdev(numbers) if len(numbers) > 1 else 0.0,
        **({"worst decile": statistics.fmean(tenth)} if len(tenth) > 1 else {}),
        "worst": numbers[0],
    }


def gain(values: Mapping[str, float], reference: Mapping[str, float], higher_is_better: bool) -> float | None:
    """The mean over the clients that both have of how much better than the reference; None where they share none."""
    sign = 1 if higher_is_better else -1
    differences = [sign * (value - reference[client]) for client, value in values.items() if client in reference]
    return statistics.fmean(differences) if differences else None


def check_one_split(records: Sequence[Record]) -> None:
    """Runs that stand side by side were evaluated on rows of one split, where they say of which.

    Raises:
        ValueError: on rows of several; names a run of each.
    """
    found = {record.split: record.folder for record in records if record.split}
    if len(found) > 1:
        told = ", ".join(f"{folder} on {split} rows" for split, folder in sorted(found.items()))
        raise ValueError(f"evaluated on different rows, so their figures can't be compared: {told}; leave one kind out")


def read_document(path: Path) -> dict[str, Any]:
    """A JSON document written by fedgraft, {} when there is none.

    Raises:
        ValueError: damaged, or a newer schema; names the file.
    """
    if not path.exists():
        return {}
    try:
        document = files.parse_json(path.read_bytes())
        schema = int(document.get("schema", 0))
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        raise _damaged(path, error) from None
    _check_schema(path, schema)
    return dict(document)


def read_recipe(path: Path) -> dict[str, Any]:
    """The complete recipe of a run.

    Raises:
        ValueError: damaged, or a newer schema; names the file.
    """
    try:
        values = dict(read_written(files.read_text(path)))
        schema = int(values.pop("schema"))
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise _damaged(path, error) from None
    _check_schema(path, schema)
    return values


def write_recipe(path: Path, recipe: dict[str, Any]) -> None:
    """Write the complete recipe, atomically."""
    files.write_text(path, yaml.safe_dump({"schema": SCHEMA, **recipe}, sort_keys=False, allow_unicode=True))


def write_document(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON document with its schema version, atomically."""
    files.write_json(path, {"schema": SCHEMA, **content})


def keep_finish(folder: Path, line: dict[str, Any]) -> None:
    """Record what was done after the last round; done again after the same number of rounds, it takes the place of what was."""
    before = [one for one in read_document(folder / FINISH).get("finishes", []) if one["round"] != line["round"]]
    write_document(folder / FINISH, {"finishes": [*before, line]})


class Choices:
    """`selection.json`: what each client chose, added once; one that joined late chooses when it first trains."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: set[str] | None = None
        """Who is in it; read once, since every reply tells the choice again."""

    def keep(self, replies: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the choices of clients that are not in it yet."""
        told = {name: facts for name, facts in replies.items() if facts.get("experts")}
        if not told or (self._known is not None and told.keys() <= self._known):
            return
        known = read_document(self.path).get("clients", {})
        chosen = {name: {key: facts[key] for key in CHOICE if key in facts} for name, facts in told.items() if name not in known}
        if chosen:
            write_document(self.path, {"clients": known | chosen})
        self._known = {*known, *chosen}


def sweep_runs(folder: Path) -> list[Path] | None:
    """The run folders of a sweep by its `sweep.json`, begun or not; None where the folder is no sweep's."""
    document = read_document(folder / SWEEP)
    return [folder / point["name"] for point in document["points"]] if document else None


def resume_command(folder: Path) -> str:
    """What continues a run, as it is typed where the user stands."""
    here = Path.cwd()
    shown = str(folder.relative_to(here) if folder.is_absolute() and folder.is_relative_to(here) else folder)
    return f"fedgraft resume {QUOTE(shown)}"


def _damaged(path: Path, error: Exception) -> ValueError:
    why = " ".join(str(error).split())
    return ValueError(f"{path}: damaged ({why}); restore the file from a copy, or start a new run")


def _check_schema(path: Path, schema: int) -> None:
    if schema > SCHEMA:
        raise ValueError(f"{path}: written by a newer fedgraft (schema {schema}, this one reads up to {SCHEMA}); upgrade fedgraft")
