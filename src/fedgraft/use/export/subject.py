"""What is exported, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fedgraft.grafts.graft import Fitted
from fedgraft.moe.load import Base
from fedgraft.recipe import Recipe
from fedgraft.use.loaded import Loaded


@dataclass(frozen=True)
class Subject:
    """One model of a run, live."""

    loaded: Loaded
    name: str

    @property
    def recipe(self) -> Recipe:
        """The run's."""
        return self.loaded.source.recipe

    @property
    def base(self) -> Base:
        """The base, which a format may change: it is not used any more then."""
        return self.loaded.grafted.base

    @property
    def fitted(self) -> Fitted:
        """The leaves at their places."""
        return self.loaded.fitted(self.name)

    @property
    def about(self) -> dict[str, Any]:
        """What the card says."""
        return self.loaded.source.about(self.name)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was written."""

    kind: str
    """In words."""
    loading: str
    """The Python lines that load it; `FOLDER` stands for where it lies."""
    notes: list[str] = field(default_factory=list)
    """What is to be known, and needs nothing done."""
    difference: float | None = None
    """The largest difference of a logit from the live model's on a probe, where it was reloaded."""
