"""`fedgraft init`: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json

import pytest

from fedgraft.recipe import load_recipe
from fedgraft.yaml_text import read_yaml
from tests.run.conftest import command  # noqa: F401  # a fixture
from tests.starter.test_suggest import rows, write

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in Click:DeprecationWarning")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bakery", "garden"):
        write(tmp_path / "data" / f"{name}.jsonl", rows(note=name))
    return tmp_path


def test_init_writes_a_recipe_that_loads_and_says_how_to_run_it(command, here):  # noqa: F811
    done = command("init", "data")
    assert (done.code, done.err) == (0, "")
    for words in (
        "bakery",
        "garden",
        "18",
        "data.max_length 64: cuts 0 rows",
        "one client per file",
        "no problem found",
        "fedgraft run recipe.yaml",
    ):
        assert words in done.out
    text = (here / "recipe.yaml").read_text(encoding="utf-8")
    assert text.startswith("# A recipe for data: 2 clients, 56 rows.")
    assert load_recipe(read_yaml(text, "recipe.yaml")).data.path == "data"
    again = command("init", "data")
    assert (again.code, again.out) == (2, "")
    assert "recipe.yaml: exists and is never overwritten" in again.err
    assert (here / "recipe.yaml").read_text(encoding="utf-8") == text


def test_check_writes_nothing_and_tells_each_remedy_once(command, here):  # noqa: F811
    for name in ("bakery", "garden"):
        write(here / "data" / f"{name}.jsonl", rows(note=name)[:-2])
    done = command("init", "data", "--check")
    assert done.code == 0
    assert "! client bakery: only 3 test rows" in done.out
    assert "! client garden: only 3 test rows" in done.out
    assert done.out.count("  -> add rows, or give more of them") == 1
    assert "2 things to look at" in done.out
    assert not list(here.glob("*.yaml"))


def test_json_is_one_document(command, here):  # noqa: F811
    done = command("init", "data", "--method", "fedavg", "--out", "fedavg.yaml", "--json")
    document = json.loads(done.out)
    assert (done.code, done.err, document["recipe"]) == (0, "", "fedavg.yaml")
    assert load_recipe(document["values"]) == load_recipe("fedavg.yaml")
    assert document["clients"]["garden"]["rows"] == {"train": 18, "validation": 5, "test": 5}
    assert document["problems"] == []


def test_class_balance_is_shown_where_there_are_classes(command, here):  # noqa: F811
    labelled = [{**row, "response": ("yes", "no")[number % 2]} for number, row in enumerate(rows(note="x"))]
    write(here / "data" / "garden.jsonl", labelled)
    write(here / "data" / "bakery.jsonl", [{**row, "prompt": f"Other: {row['prompt']}"} for row in labelled])
    assert "  garden  no 14, yes 14\n" in command("init", "data", "--check").out


@pytest.mark.parametrize(
    ("line", "told"),
    [("{", "garden.jsonl, line 3: broken JSON"), ('{"question": "x"}', "garden.jsonl, line 3: no layout fits the fields found (question)")],
)
def test_a_bad_row_is_named_by_file_and_line(command, here, line, told):  # noqa: F811
    path = here / "data" / "garden.jsonl"
    path.write_text("\n".join([*path.read_text().splitlines()[:2], line]) + "\n")
    done = command("init", "data")
    assert (done.code, done.out) == (2, "")
    assert told in done.err
    assert not list(here.glob("*.yaml"))
