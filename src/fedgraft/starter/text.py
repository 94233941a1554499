"""A recipe as a file that explains itself: chosen keys are set, all others stand commented out with their defaults."""

from __future__ import annotations

import textwrap
from typing import Any

from fedgraft.starter.keys import Key, as_yaml, method_options, sections, unused_sections

WIDTH = 110


def commented(values: dict[str, Any], notes: dict[str, str], heading: str) -> str:
    """A recipe file with every key that its method uses.

    Args:
        values: section -> key -> value, and values of keys outside the sections; names a method.
        notes: `section.key` -> why this value.
        heading: what stands above everything.
    """
    method = values["method"]["name"]
    blocks = [_comment(heading)]
    for section in sections():
        if section.name in unused_sections(method):
            continue
        keys = section.keys + (method_options(method) if section.name == "method" else [])
        given = values.get(section.name, {}) if section.name else values
        lines = [_entry(key, given, notes) for key in keys]
        if section.name:
            lines = [f"{_comment(section.meaning)}\n{section.name}:", *(textwrap.indent(line, "  ") for line in lines)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _entry(key: Key, given: dict[str, Any], notes: dict[str, str]) -> str:
    """Meaning as a comment, then the key: set where it is given, else commented out without a blank after `#`."""
    text = _comment(f"{key.meaning} ({key.values})".replace("`", ""))
    if key.name not in given:
        return f"{text}\n#{key.name}: {as_yaml(key.default)}"
    note = notes.get(f"{key.section}.{key.name}")
    return f"{text}\n{key.name}: {as_yaml(given[key.name])}{f'  # {note}' if note else ''}"


def _comment(text: str) -> str:
    return "\n".join(f"# {line}".rstrip() for line in textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False))
