"""The suggested recipe for rows of every shape: it loads, divides as documented, and cuts nothing without saying so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedgraft.data.partition import load_clients
from fedgraft.recipe import load_recipe
from fedgraft.starter.suggest import suggest

SPLITS = ["train"] * 18 + ["validation"] * 5 + ["test"] * 5


def write(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows(splits: list[str] = SPLITS, **fields: str) -> list[dict]:
    made = [{"prompt": f"Question {number} of {fields}?", "response": f"Answer {number}.", **fields} for number in range(len(splits))]
    return [row | {"split": split} for row, split in zip(made, splits, strict=True)]


def divided(start) -> tuple[str, list[str]]:
    recipe = load_recipe(start.values)
    return recipe.data.partition, [client.name for client in load_clients(recipe.data, recipe.seed)]


def test_files_of_a_folder_are_clients(tmp_path):
    for name in ("bakery", "garden"):
        write(tmp_path / f"{name}.jsonl", rows(note=name))
    write(tmp_path / "harbour" / "train.jsonl", rows(note="harbour"))
    start = suggest(str(tmp_path))
    assert divided(start) == ("files", ["bakery", "garden", "harbour"])
    assert start.survey.problems == []
    with pytest.raises(ValueError, match="leave --clients out"):
        suggest(str(tmp_path), clients=2)


def test_categories_of_a_file_are_clients_unless_told_otherwise_or_too_small(tmp_path):
    two = write(tmp_path / "two.jsonl", rows(category="red") + rows(category="blue"))
    assert divided(suggest(two)) == ("category", ["blue", "red"])
    assert divided(suggest(two, clients=3)) == ("dirichlet", ["client-00", "client-01", "client-02"])
    small = write(tmp_path / "small.jsonl", rows(category="red") + rows(category="blue") + rows(["train"] * 9, category="grey"))
    assert divided(suggest(small))[0] == "dirichlet"
    unfit = write(tmp_path / "unfit.jsonl", rows(category="light red") + rows(category="blue"))
    assert divided(suggest(unfit))[0] == "dirichlet"


def test_rows_without_categories_are_divided_evenly(tmp_path):
    one = write(tmp_path / "one.jsonl", rows())
    assert divided(suggest(one)) == ("iid", [f"client-0{number}" for number in range(4)])
    assert len(divided(suggest(one, clients=2))[1]) == 2


def test_a_folder_of_splits_is_one_set(tmp_path):
    for split in ("train", "validation", "test"):
        write(tmp_path / "set" / f"{split}.jsonl", [{key: row[key] for key in ("prompt", "response")} for row in rows(note=split)])
    assert divided(suggest(str(tmp_path / "set")))[0] == "iid"


def test_nothing_is_cut_unless_a_row_is_beyond_the_model(tmp_path):
    fine = suggest(write(tmp_path / "fine.jsonl", rows()))
    longest = max(client.longest for client in fine.survey.clients.values())
    length = fine.values["data"]["max_length"]
    assert longest <= length < longest + 64
    assert length % 32 == 0
    assert not any(client.cut for client in fine.survey.clients.values())
    long = rows()
    long[0]["context"] = "A long word list goes on and on. " * 400
    beyond = suggest(write(tmp_path / "long.jsonl", long))
    assert beyond.values["data"]["max_length"] == 1024  # the embedded tokenizer's limit
    assert (sum(client.cut for client in beyond.survey.clients.values()), beyond.cut_by_default) == (1, 1)


def test_few_rows_are_passed_over_three_times(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", rows(["train"] * 200 + ["validation", "test"], note=name))
    training, rounds = load_recipe(suggest(str(tmp_path)).values).training, load_recipe(suggest(str(tmp_path)).values).federation.rounds
    assert rounds * training.steps * training.batch_size == 3 * 200


def test_settings_of_the_embedded_model_are_the_demo_s_and_of_others_the_paper_s(tmp_path):
    path = write(tmp_path / "one.jsonl", rows())
    demo, own = load_recipe(None), load_recipe(suggest(path).values)
    assert (own.graft, own.lora, own.training.lr) == (demo.graft, demo.lora, demo.training.lr)
    fedavg = suggest(path, method="fedavg")
    assert "graft" not in fedavg.values
    start = suggest(path, model=str(tmp_path / "no" / "model"))
    other = load_recipe(start.values)
    assert (other.training.lr, other.graft.train, other.model.dtype, other.training.checkpointing) == (4e-5, "lora", "bfloat16", True)
    assert start.tokenizer == "demo"
    assert "no such folder" in start.survey.problems[0].problem


def test_missing_splits_are_bridged_or_explained(tmp_path):
    write(tmp_path / "full.jsonl", rows(note="full"))
    write(tmp_path / "half.jsonl", rows(["train"] * 18 + ["test"] * 5, note="half"))
    start = suggest(str(tmp_path))
    assert start.values["data"]["validation_rows"] == 0
    assert [(problem.client, problem.problem) for problem in start.survey.problems] == [("half", "no validation rows")]
    divided(start)
    write(tmp_path / "half.jsonl", rows(["train"] * 18 + ["validation"] * 5, note="half"))
    start = suggest(str(tmp_path))
    assert (start.values["data"]["test_rows"], start.values["evaluation"]["split"]) == (0, "validation")
    divided(start)
    write(tmp_path / "full.jsonl", rows(["train"] * 18 + ["test"] * 5, note="full"))
    with pytest.raises(ValueError, match=r"'half' has no test rows and client 'full' no validation rows.*\"split\": \"test\""):
        suggest(str(tmp_path))
    write(tmp_path / "full.jsonl", rows(["validation", "test"], note="full"))
    with pytest.raises(ValueError, match="'full' has no train rows"):
        suggest(str(tmp_path))


@pytest.mark.parametrize(
    ("method", "path", "told"), [("flexx", "one.jsonl", "did you mean 'flex'"), ("flex", "two.jsonl", "no such file or folder")]
)
def test_wrong_names_are_told_at_once(tmp_path, method, path, told):
    write(tmp_path / "one.jsonl", rows())
    with pytest.raises(ValueError, match=told):
        suggest(str(tmp_path / path), method=method)
