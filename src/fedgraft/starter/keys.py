"""Every key of a recipe as the settings models define it: what a value can be, its default, and its meaning."""

from __future__ import annotations

import dataclasses
import inspect
import types
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from fedgraft import plugins
from fedgraft.recipe import METHOD_SECTIONS, Recipe
from fedgraft.settings import Section

BOUNDS = ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))
PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a recipe."""

    section: str
    """"" for a key that stands outside the sections."""
    name: str
    values: str
    """What it can be, in words."""
    default: Any
    meaning: str


@dataclass(frozen=True, kw_only=True)
class KeySection:
    """One section of a recipe."""

    name: str
    meaning: str
    keys: list[Key]
    kinds: dict[str, KeySection] = dataclasses.field(default_factory=dict)
    """The other kinds of a section that comes in kinds; `keys` are those of the default one."""


def sections() -> list[KeySection]:
    """All sections in the order of a recipe; the keys outside the sections come last, as a section without a name."""
    found, outside = [], []
    for name, field in Recipe.model_fields.items():
        kinds = [model for model in get_args(field.annotation) if issubclass(model, Section)]
        models = {model.model_fields["name"].default: model for model in kinds}
        model = type(field.default) if kinds else field.annotation
        if isinstance(model, type) and issubclass(model, Section):
            others = {kind: _section(kind, other) for kind, other in models.items() if other is not model}
            found.append(replace(_section(name, model), kinds=others))
        else:
            outside.append(_key("", name, field))
    return [*found, KeySection(name="", meaning="", keys=outside)]


def method_options(method: str) -> list[Key]:
    """A method's own options, which are further keys of the section `method`; their meanings are the `Args` of its `build`."""
    build = plugins.load("method", method).build
    meanings = _arguments(inspect.getdoc(build) or "")
    hints = inspect.get_annotations(build, eval_str=True)
    return [
        Key(section="method", name=name, values=in_words(hints.get(name, Any)), default=option.default, meaning=meanings.get(name, ""))
        for name, option in inspect.signature(build).parameters.items()
    ]


def unused_sections(method: str) -> frozenset[str]:
    """Sections that the method doesn't use, so that a recipe must not set them."""
    return METHOD_SECTIONS - Recipe.model_validate({"method": {"name": method}}).build_method().sections


def in_words(annotation: Any, bounds: tuple[Any, ...] = ()) -> str:
    """What a value of this type can be.

    Args:
        annotation: the type of a setting.
        bounds: pydantic's metadata beside it, of which ranges are told.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        metadata = [part for extra in inner[1:] for part in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return in_words(inner[0], (*bounds, *metadata))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        told = [in_words(option, bounds) for option in inner if option is not type(None)]
        return " or ".join([*told, *(["empty"] if type(None) in inner else [])])
    if origin in (list, tuple, dict):
        least = next((f", at least {bound.min_length}" for bound in bounds if isinstance(bound, MinLen)), "")
        parts = [in_words(part) for part in inner]
        return f"mapping of {parts[0]} to {parts[1]}" if origin is dict else f"list of {parts[0]}{least}"
    if isinstance(annotation, type) and issubclass(annotation, Section):  # a section inside a section
        words = ", ".join(f"{name}: {in_words(key.annotation, tuple(key.metadata))}" for name, key in annotation.model_fields.items())
        return f"{{{words}}}"
    ranges = [f"{sign} {getattr(bound, name):g}" for kind, name, sign in BOUNDS for bound in bounds if isinstance(bound, kind)]
    return " ".join([PLAIN.get(annotation, "value"), ", ".join(ranges)]).strip()


def as_yaml(value: Any) -> str:
    """A value as it stands in a recipe, on one line."""
    plain = list(value) if isinstance(value, tuple) else value.model_dump(mode="json") if isinstance(value, Section) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=float("inf"), allow_unicode=True).removesuffix("...\n").strip()


def _section(name: str, model: type[Section]) -> KeySection:
    keys = [_key(name, key, inner) for key, inner in model.model_fields.items()]
    return KeySection(name=name, meaning=inspect.cleandoc(model.__doc__ or ""), keys=keys)


def _key(section: str, name: str, field: FieldInfo) -> Key:
    values = in_words(field.annotation, tuple(field.metadata))
    return Key(section=section, name=name, values=values, default=field.default, meaning=" ".join((field.description or "").split()))


def _arguments(docstring: str) -> dict[str, str]:
    """Name -> meaning from the `Args:` of a Google docstring."""
    lines = docstring.partition("Args:\n")[2].splitlines()
    found: dict[str, str] = {}
    for line in lines:
        if not line.startswith("    "):
            break
        name, colon, meaning = line.strip().partition(": ")
        if colon and not line.startswith("     "):
            found[name] = meaning
        elif found:
            found[list(found)[-1]] += f" {line.strip()}"
    return found
