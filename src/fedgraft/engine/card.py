"""What a coordinator knows of a client before the first round, without seeing a row."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
    def of(facts: dict[str, Any]) -> Card:
        """The inverse of `as_facts`; keys of a newer version are left out.

        Raises:
            ValueError: a key is missing.
        """
        known = {name: facts[name] for name in Card.__dataclass_fields__ if name in facts}
        try:
            return Card(**{**known, "base_notes": tuple(known.get("base_notes", ()))})
        except TypeError as error:
            raise ValueError(f"a client's card is not one ({error}); the versions of fedgraft differ too much") from None
