"""Choices made before a run, in a file that it reads in the place of choosing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedgraft import files
from fedgraft.data.clients import data_digest
from fedgraft.data.partition import ClientData
from fedgraft.moe.load import Base
from fedgraft.selection.select import Choice
from fedgraft.selection.settings import SelectionSettings
from fedgraft.settings import Section

SCHEMA = 1
AGAIN = "choose again with: fedgraft select"


class Kept(Section):
    """One client's choice."""

    rows: str
    """Digest of its training rows."""
    experts: list[list[int]]
    errors: list[list[float]]
    tokens: int
    mixture: list[list[tuple[int, float]]]


class Prepared(Section):
    """A file of choices."""

    base: str
    base_digest: str
    criterion: str
    text: str
    dtype: str
    """Of the weights it was chosen by."""
    clients: dict[str, Kept]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run asks of a choice."""

    base: Base
    data: ClientData
    settings: SelectionSettings
    per_layer: int
    mixture: int


def rows_digest(data: ClientData) -> str:
    """SHA-256 over a client's training rows, which alone may decide its experts."""
    return data_digest(replace(data, validation=[], test=[]))


def write_choices(path: Path, about: dict[str, str], choices: dict[str, Choice], clients: Mapping[str, ClientData]) -> None:
    """Write a file of choices, atomically; `about` has the fields of `Prepared` but `clients`."""
    kept = {name: {"rows": rows_digest(clients[name]), **asdict(choice)} for name, choice in choices.items()}
    files.write_json(path, {"schema": SCHEMA, **about, "clients": kept})


def read_choices(path: Path) -> Prepared:
    """A file of choices.

    Raises:
        ValueError: there is none, it is damaged, or of a newer fedgraft.
    """
    if not path.is_file():
        raise ValueError(f"selection.file: {path}: there is no such file; {AGAIN}")
    try:
        content: Any = files.parse_json(path.read_bytes())
        if isinstance(content, dict) and content.get("schema") == SCHEMA:
            return Prepared.model_validate({key: value for key, value in content.items() if key != "schema"})
    except ValueError as error:
        raise ValueError(f"selection.file: {path}: damaged ({' '.join(str(error).split())[:300]}); {AGAIN}") from error
    raise ValueError(f"selection.file: {path}: no choices that this fedgraft can read (schema {SCHEMA}); {AGAIN}")


def prepared_choice(path: Path, wanted: Wanted) -> Choice:
    """A client's choice from a file.

    Raises:
        ValueError: the file is not of this base, these rows or this recipe.
    """
    found, name, settings = read_choices(path), wanted.data.name, wanted.settings
    kept = found.clients.get(name)
    if kept is None:
        raise ValueError(f"selection.file: {path}: has no choice of client {name!r} but of {', '.join(sorted(found.clients))}; {AGAIN}")
    layers, experts = len(wanted.base.sites), wanted.base.sites[0].num_experts
    fits = len(kept.experts) == layers and all(0 <= expert < experts for chosen in kept.experts for expert in chosen)
    for differs, what in (
        (found.base_digest != wanted.base.digest, f"was made with another base than model.name is ({found.base})"),
        (kept.rows != rows_digest(wanted.data), f"was made with other training rows of client {name!r}"),
        (
            found.criterion != settings.criterion,
            f"was made with selection.criterion {found.criterion}, the recipe has {settings.criterion}",
        ),
        (found.text != settings.text, f"was made with selection.text {found.text}, the recipe has {settings.text}"),
        (not fits, f"names experts that the base does not have ({layers} layers of {experts})"),
        (
            any(len(chosen) != wanted.per_layer for chosen in kept.experts),
            f"does not have {wanted.per_layer} experts in every layer (graft.per_layer)",
        ),
        (
            any(len(parts) != wanted.mixture for parts in kept.mixture) or bool(kept.mixture) != (wanted.mixture > 1),
            f"has no mixtures of {wanted.mixture} (graft.mixture)",
        ),
    ):
        if differs:
            raise ValueError(f"selection.file: {path}: {what}; {AGAIN}")
    return Choice(experts=kept.experts, errors=kept.errors, tokens=kept.tokens, mixture=kept.mixture)
