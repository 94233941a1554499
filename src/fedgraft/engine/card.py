"""What a coordinator knows of a client before the first round, without seeing a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedgraft.data.example import SPLITS
from fedgraft.data.partition import SAFE_NAME


@dataclass(frozen=True, kw_only=True)
class Card:
    """A client as it introduces itself. Numbers, digests and names only."""

    name: str
    rows: dict[str, int]
    """Rows of each split."""
    categories: dict[str, int]
    """Training rows of each category."""
    data_digest: str
    """Digest over all rows, by which a resumed run knows them again."""
    base_digest: str
    base_notes: tuple[str, ...] = ()
    """What loading the base changed or left out."""
    device: str = "cpu"
    threads: int = 1
    """Torch threads, on whose number bits can depend."""
    fedgraft: str = ""
    """The version installed there."""

    def as_facts(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "base_notes": list(self.base_notes)}

    @staticmethod
    def of(facts: Any) -> Card:
        """The inverse of `as_facts`; keys of a newer version are left out.

        Raises:
            ValueError: a key is missing or of another type, or the name cannot be a folder's.
        """
        known = {name: facts[name] for name in Card.__dataclass_fields__ if name in facts} if isinstance(facts, dict) else {}
        try:
            card = CARD.validate_python(known)
        except ValidationError as error:
            problem = error.errors()[0]
            why = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            raise ValueError(f"a client's card is not one ({why}); the versions of fedgraft differ too much") from None
        if not SAFE_NAME.fullmatch(card.name):
            raise ValueError(f"a client's card is not one: the name {card.name[:100]!r} cannot be that of a folder")
        if card.rows.keys() != set(SPLITS) or min([*card.rows.values(), *card.categories.values()]) < 0:
            raise ValueError(f"a client's card is not one: its rows are not numbers for {', '.join(SPLITS)}")
        return card


CARD = TypeAdapter(Card)


def check_bases(cards: Sequence[Card]) -> None:
    """All clients hold the same base model.

    Raises:
        ValueError: they don't; names who holds which.
    """
    held: dict[str, list[str]] = {}
    for card in cards:
        held.setdefault(card.base_digest, []).append(card.name)
    if len(held) > 1:
        told = "; ".join(f"{digest[:12]} at {', '.join(names)}" for digest, names in sorted(held.items(), key=lambda one: -len(one[1])))
        raise ValueError(f"the clients hold different base models ({told}); give all of them the same files")
