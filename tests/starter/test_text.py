"""A commented recipe says what its values say, and everything in it can be uncommented."""

from __future__ import annotations

import re

import pytest

from fedgraft import plugins
from fedgraft.recipe import load_recipe
from fedgraft.starter.keys import unused_sections
from fedgraft.starter.text import commented
from fedgraft.yaml_text import read_yaml


def values(method: str) -> dict:
    some = {
        "data": {"dataset": "jsonl", "path": "a: b #c", "categories": ["1", "two"]},
        "method": {"name": method},
        "training": {"lr": 4e-5},
    }
    return some | ({} if "graft" in unused_sections(method) else {"graft": {"train": "full"}})


@pytest.mark.parametrize("method", plugins.names("method"))
def test_what_is_set_is_what_was_given(method):
    text = commented(values(method), {"training.lr": "the paper's"}, "Heading.")
    assert load_recipe(read_yaml(text, "text")) == load_recipe(values(method))
    assert text.startswith("# Heading.\n")
    assert "  # the paper's\n" in text


@pytest.mark.parametrize("method", plugins.names("method"))
def test_what_is_commented_out_are_the_defaults(method):
    text = commented(values(method), {}, "Heading.")
    everything = re.sub(r"^( *)#(\w)", r"\1\2", text, flags=re.MULTILINE)
    given = read_yaml(everything, "text")
    assert load_recipe(given).complete() == load_recipe(values(method)).complete()
    assert {name: set(section) for name, section in given.items() if isinstance(section, dict)} == {
        name: set(section) for name, section in load_recipe(values(method)).complete().items() if isinstance(section, dict)
    }


def test_lines_stay_readable():
    assert max(map(len, commented(values("flex"), {}, "word " * 60).splitlines())) <= 115
