"""A first recipe for a user's own JSON-lines rows: how they are divided, how long they are, how long to train."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedgraft.data.datasets import jsonl
from fedgraft.data.example import SPLITS
from fedgraft.data.partition import PARTITIONS, SAFE_NAME, ClientData, load_clients
from fedgraft.data.settings import DataSettings
from fedgraft.data.survey import Problem, Survey, row_lengths, survey
from fedgraft.moe.settings import EMBEDDED
from fedgraft.moe.tokenizer import load_tokenizer, stated_limit
from fedgraft.recipe import find_recipe, load_recipe
from fedgraft.starter.keys import unused_sections
from fedgraft.yaml_text import read_yaml

FEW = 10  # rows below which a category is too small to be a client
CLIENTS = 4
PASSES = 3  # over the median client's training rows in the whole run
ROUNDS = (3, 100)  # 100 are the paper's
LONGEST_ROW = 2_048  # tokens; what is longer is cut unless the user says otherwise
LONGEST_ANSWER = 256


@dataclass(frozen=True, kw_only=True)
class Start:
    """A suggested recipe, why it is so, and the survey of the rows."""

    values: dict[str, Any]
    """Section -> key -> value, for `load_recipe`."""
    notes: dict[str, str]
    """`section.key` -> why this value."""
    tokenizer: str
    """The model whose tokenizer counted."""
    survey: Survey
    cut_by_default: int
    """Rows that the default of data.max_length would cut."""


def suggest(path: str, *, model: str = EMBEDDED, method: str = "flex", clients: int | None = None) -> Start:
    """Read all rows at `path` and suggest a recipe.

    Args:
        path: a JSON-lines file, or a folder with one file or subfolder per client.
        model: what the recipe's `model.name` shall be; its tokenizer is loaded, or the embedded model's where it can't be.
        method: what `method.name` shall be.
        clients: how many clients to divide one file among; None: one per category where there are such, else 4.

    Raises:
        ValueError: nothing to read, a row that is not understood, a client without rows to train or be evaluated on, or an unknown method.
    """
    if not Path(path).expanduser().exists():
        raise ValueError(f"{path}: there is no such file or folder")
    load_recipe({"method": {"name": method}})  # an unknown method ends here, before the rows are read
    path = path if Path(path).exists() else str(Path(path).expanduser())
    notes: dict[str, str] = {}
    data: dict[str, Any] = {"dataset": "jsonl", "path": path, **_division(path, clients, notes)}
    settings = DataSettings.model_validate(data)
    found = PARTITIONS[settings.partition](settings, jsonl.load, 0)
    evaluation, problems = _splits(found, data, notes)
    counted_by, tokenizer, missing = _tokenizer(model)
    data["template"] = "chat" if tokenizer.chat_template else "alpaca"
    held = load_clients(DataSettings.model_validate(data), 0)
    lengths = row_lengths(held, tokenizer, data["template"])
    totals = [prompt + response for rows in lengths.values() for prompt, response in rows]
    data["max_length"] = min(max(64, _up(max(totals), 32)), stated_limit(tokenizer) or LONGEST_ROW, LONGEST_ROW)
    notes["data.max_length"] = f"the longest row has {max(totals)} tokens"
    answers = [response for rows in lengths.values() for _, response in rows]
    evaluation["max_new_tokens"] = _answer(answers)
    notes["evaluation.max_new_tokens"] = "95 % of the responses are shorter, or it is the limit"
    values = {"data": data, "method": {"name": method}, **_training(held, model, method, notes), "evaluation": evaluation, "seed": 0}
    recipe = load_recipe(values)
    seen = survey(held, lengths, recipe.data)
    seen = Survey(max_length=seen.max_length, clients=seen.clients, problems=[*missing, *problems, *seen.problems])
    cut = sum(total > DataSettings().max_length for total in totals)
    return Start(values=values, notes=notes, tokenizer=counted_by, survey=seen, cut_by_default=cut)


def _division(path: str, clients: int | None, notes: dict[str, str]) -> dict[str, Any]:
    """The partition: files of a folder; else categories that can be clients; else mixtures of them; else evenly."""
    folder = Path(path)
    if folder.is_dir() and not any(jsonl.stem(entry).lower() in jsonl.SPLIT_NAMES for entry in folder.iterdir() if entry.is_file()):
        if clients is not None:
            raise ValueError(f"{path}: every file or subfolder of a folder is a client; leave --clients out, or give one file")
        notes["data.partition"] = "one client per file or subfolder"
        return {"partition": "files"}
    kinds = Counter(row.category for split in SPLITS for row in jsonl.load(split, path))
    if len(kinds) > 1 and clients is None and min(kinds.values()) >= FEW and all(map(SAFE_NAME.fullmatch, kinds)):
        notes["data.partition"] = f"{len(kinds)} categories, each with {FEW} rows or more: one client per category"
        return {"partition": "category"}
    if len(kinds) > 1:
        notes["data.partition"] = f"{len(kinds)} categories: each client gets its own mixture of them"
        return {"partition": "dirichlet", "clients": clients or CLIENTS}
    notes["data.partition"] = "rows without categories: divided evenly, which makes the clients alike"
    return {"partition": "iid", "clients": clients or CLIENTS}


def _splits(clients: list[ClientData], data: dict[str, Any], notes: dict[str, str]) -> tuple[dict[str, Any], list[Problem]]:
    """Settings of `evaluation`, and of `data` where a client lacks validation or test rows, and what to say about it."""
    lacking = {split: [client.name for client in clients if not getattr(client, split)] for split in ("validation", "test")}
    if lacking["validation"] and lacking["test"]:
        raise ValueError(
            f"client {lacking['test'][0]!r} has no test rows and client {lacking['validation'][0]!r} no validation rows: rows without "
            'the field "split" are divided 80/10/10 by a hash of the prompt, which can leave a small client without; '
            'give a few rows of each client "split": "test" and "split": "validation", or add rows'
        )
    problems = []
    for split, names in lacking.items():
        for name in names:
            remedy = f"give some of its rows the field `split: {split}`; until then the recipe sets data.{split}_rows: 0"
            problems.append(Problem(client=name, problem=f"no {split} rows", remedy=remedy))
        if names:
            data[f"{split}_rows"] = 0
            notes[f"data.{split}_rows"] = f"client {names[0]} has none"
    if not lacking["test"]:
        return {}, problems
    notes["evaluation.split"] = f"client {lacking['test'][0]} has no test rows"
    return {"split": "validation"}, problems


def _tokenizer(model: str) -> tuple[str, Any, list[Problem]]:
    """(whose, tokenizer, what to say): the model's own, or the embedded one where that can't be had."""
    try:
        return model, load_tokenizer(model), []
    except ValueError as error:
        problem = str(error).split("\n", maxsplit=1)[0].rstrip(" (")
        remedy = "lengths are counted with the embedded model's tokenizer, so set data.max_length anew when the model can be loaded"
        return EMBEDDED, load_tokenizer(EMBEDDED), [Problem(client="", problem=problem, remedy=remedy)]


def _training(clients: list[ClientData], model: str, method: str, notes: dict[str, str]) -> dict[str, Any]:
    """Sizes and pace: the embedded model's are those of the demo recipe, others keep the paper's and save memory."""
    rows = [len(client.train) for client in clients]
    if model == EMBEDDED:
        demo = find_recipe(None)
        values = read_yaml(demo.read_text(encoding="utf-8"), str(demo))
        chosen = {name: dict(values[name]) for name in {"model", "graft", "lora", "training"} - unused_sections(method)}
        notes["training.lr"] = "the demo's, for a model this small"
    else:
        chosen = {"model": {"name": model, "dtype": "bfloat16"}, "training": {"lr": 4e-5, "precision": "bf16", "checkpointing": True}}
        notes["training.lr"] = "the paper's"
    batch = min(4, *rows)
    steps = 5
    rounds = min(max(math.ceil(PASSES * float(np.median(rows)) / (steps * batch)), ROUNDS[0]), ROUNDS[1])
    chosen["training"] |= {"steps": steps, "batch_size": batch}
    notes["federation.rounds"] = f"{rounds * steps * batch} rows a client; the median client has {int(np.median(rows))}"
    return chosen | {"federation": {"rounds": rounds}}


def _answer(responses: list[int]) -> int:
    """A power of two that 95 % of the responses fit in, from 8 to LONGEST_ANSWER."""
    wanted = max(8, int(np.percentile(responses, 95, method="higher")))
    return min(1 << (wanted - 1).bit_length(), LONGEST_ANSWER)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
