"""The model of a folder that was exported in fedgraft's own format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedgraft.bundle import Bundle
from fedgraft.grafts.graft import GraftedModel
from fedgraft.handover.found import ABOUT, LEAVES
from fedgraft.methods.method import Prediction
from fedgraft.report.record import read_document
from fedgraft.use.source import SHARED, own_recipe


class ExportSource:
    """One model and its base."""

    notes: tuple[str, ...] = ()

    def __init__(self, folder: Path, overrides: Sequence[str] = ()) -> None:
        """Read what the folder says; the leaves are read when they are used.

        Raises:
            ValueError: damaged, or written by a newer fedgraft.
        """
        self.folder, self.where = folder, str(folder)
        document = read_document(folder / ABOUT)
        try:
            self.first, self.base_digest = str(document["name"]), str(document["base_digest"])
            self._about, recipe = dict(document["about"]), dict(document["recipe"])
            self.has_shared = self.first == SHARED
            self.clients = {} if self.has_shared else {self.first: str(self._about["client"])}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / ABOUT}: damaged ({error}); export the model again") from None
        self.recipe = own_recipe(recipe, overrides)

    def prediction(self, name: str, model: GraftedModel) -> Prediction:
        """The leaves of the folder."""
        bundle = Bundle.load(self.folder / LEAVES)
        experts: Any = bundle.facts["experts"]
        return Prediction(tree=bundle.tree("model"), experts=experts)

    def about(self, name: str) -> dict[str, Any]:
        """What was known when it was exported."""
        return self._about

    def why_not(self, name: str) -> str:
        """It holds one model alone."""
        return f" (an export holds one model, {self.first!r})"
