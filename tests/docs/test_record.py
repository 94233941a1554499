"""The page on the record names every field that a run writes, and its lines load them."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec

import pytest

from fedgraft.runner import run
from tests.docs.pages import DOCS, blocks
from tests.run.conftest import world  # noqa: F401  # a fixture

PAGE = DOCS / "record.md"
OF_NAMES = ("clients", "simulated.seconds", "simulated.steps", "failed")  # objects whose keys are clients


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):  # noqa: F811
    """A run with everything that a line can hold but a failure, a leave and a sum that stays closed."""
    absent = {"rounds": 4, "dropout": 0.3, "deadline": 1.2, "step_seconds": [0.3, 0.5], "jitter": 0.5}
    recipe = world.recipe(
        federation=absent, training={"least_steps": 1, "steps": 3}, evaluation={"generate": False, "experts": False, "models": ["personal"]}
    )
    return run(recipe, out=tmp_path_factory.mktemp("record") / "one").folder


def names(line, place=""):
    """The fields of a line as the page writes them."""
    for key, value in line.items():
        name = f"{place}{key}"
        yield name
        if name in OF_NAMES:
            for inner in value.values():
                yield from names(inner, f"{name}.*.") if isinstance(inner, dict) else ()
        elif isinstance(value, dict):
            yield from names(value, f"{name}.")


def test_every_field_of_a_line_is_on_the_page_and_no_other(folder):
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    table = PAGE.read_text(encoding="utf-8").partition("## rounds.jsonl")[2].partition("\n\nA field")[0]
    told = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)}
    assert {name for line in lines for name in names(line)} | {"failed", "left", "unopened"} == told


@pytest.mark.skipif(find_spec("pandas") is None, reason="needs pandas")
def test_the_lines_for_pandas_load_it(folder, tmp_path, monkeypatch):
    (block,) = (block for block in blocks(PAGE) if "import pandas" in block.text)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(block.text, found)
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    assert found["rounds"]["loss"].tolist() == pytest.approx([line["loss"] for line in lines])
    wanted = {(line["round"], name): facts["loss"] for line in lines for name, facts in line["clients"].items()}
    assert found["clients"]["loss"].to_dict() == pytest.approx(wanted)
