"""What the doctor has to say: a note, a warning, or an error that would make a run fail."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing found, and what to do about it."""

    severity: Literal["note", "warning", "error"]
    text: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)
