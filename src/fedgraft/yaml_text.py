"""YAML as recipes and the command line hold it."""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_CHARACTERS = 1 << 20
MOST_NODES = 100_000
"""Scalars, lists and mappings of a document, each counted as often as it is repeated by an alias."""


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are what people write (4e-5 is one), and whose keys occur once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(problem="a key is one word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(problem=f"key {key.value!r} occurs twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf)$|^\.(?:nan|NaN)$"),
    list("-+0123456789."),
)
_Loader.yaml_implicit_resolvers = {
    first: sorted(resolvers, key=lambda pair: pair[0] != "tag:yaml.org,2002:int")
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str, where: str, what: str = "a recipe") -> Any:
    """Parse YAML; `what` the text should be, for messages.

    Raises:
        ValueError: broken YAML, naming the line, or not a mapping.
    """
    try:
        values = _load(text)
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{where}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{where}: {what} is a mapping of sections, this is a {type(values).__name__}")
    return values


def read_value(text: str, where: str) -> Any:
    """One YAML value.

    Raises:
        ValueError: broken YAML.
    """
    try:
        return _load(text)
    except Exception:
        raise ValueError(f"{where}: the value is not valid YAML; quote it") from None


def read_written(text: str) -> Any:
    """YAML as `yaml.safe_dump` writes it.

    Raises:
        ValueError: it is none.
    """
    try:
        return _load(text, yaml.SafeLoader)
    except Exception as error:
        raise ValueError(f"not valid YAML ({error})") from None


def _load(text: str, kind: type[yaml.SafeLoader] = _Loader) -> Any:
    """The value of a document, built only once its size is known.

    Raises:
        Exception: this is none. Besides `yaml.YAMLError` PyYAML lets through whatever the types of scalars raise: `!!int x` alone can be
            ValueError, IndexError or AttributeError, and deep nesting is a RecursionError.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{len(text):,} characters, at most {MOST_CHARACTERS:,} are read")
    loader = kind(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if (count := _count(node, {})) > MOST_NODES:
            raise ValueError(f"with its aliases {count:,} values, at most {MOST_NODES:,} are read")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Nodes below and with this one, those of aliases as often as they stand there."""
    if id(node) not in known:
        known[id(node)] = 0
        pairs = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [part for pair in pairs for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_count(part, known) for part in inner)
    elif not known[id(node)]:
        raise ValueError("an alias stands inside what it names")
    return known[id(node)]
