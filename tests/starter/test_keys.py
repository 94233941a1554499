"""Settings in words."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from fedgraft import plugins
from fedgraft.methods.method import Method
from fedgraft.recipe import Recipe
from fedgraft.starter import keys


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "whole number"),
        (bool, "true or false"),
        (str | None, "text or empty"),
        (Literal["a", "b"], "`a` or `b`"),
        (Annotated[int, Field(ge=1)], "whole number ≥ 1"),
        (Annotated[float, Field(ge=0, lt=1)], "number ≥ 0, < 1"),
        (Annotated[list[str], Field(min_length=1)] | None, "list of text, at least 1 or empty"),
        (tuple[Literal["q", "k"], ...], "list of `q` or `k`"),
        (dict[int | str, str] | None, "mapping of whole number or text to text or empty"),
    ],
)
def test_types_in_words(annotation, words):
    assert keys.in_words(annotation) == words


def test_every_key_of_a_recipe_is_there_with_a_meaning():
    found = {(section.name, key.name) for section in keys.sections() for key in section.keys}
    assert found == {(name, key) for name, value in Recipe().model_dump().items() if isinstance(value, dict) for key in value} | {
        ("", "seed")
    }
    assert [f"{key.section}.{key.name}" for section in keys.sections() for key in section.keys if not key.meaning] == []


def test_bounds_of_an_optional_key():
    (rows,) = [key for section in keys.sections() for key in section.keys if key.name == "clients_per_round"]
    assert (rows.values, rows.default) == ("whole number ≥ 1 or empty", None)


def test_options_of_a_method_come_from_its_build(monkeypatch):
    class Module:
        @staticmethod
        def build(*, mu: Annotated[float, Field(ge=0)] = 0.1, whole: bool = False) -> Method:
            """Build.

            Args:
                mu: weight of the proximal
                    term.
                whole: everything.

            Raises:
                ValueError: never.
            """
            return Method()

    monkeypatch.setattr(plugins, "load", lambda kind, name: Module)
    assert [(key.name, key.values, key.default, key.meaning) for key in keys.method_options("prox")] == [
        ("mu", "number ≥ 0", 0.1, "weight of the proximal term."),
        ("whole", "true or false", False, "everything."),
    ]
