"""What can be loaded: a folder with the leaves of several models on one base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fedgraft import plugins
from fedgraft.grafts.graft import GraftedModel
from fedgraft.methods.method import Prediction
from fedgraft.recipe import Recipe, load_recipe

BASE, SHARED = "base", "shared"
"""The models that are no client's: the untouched base, and the aggregated leaves without any personal ones."""
UNTOUCHED = Prediction(tree={}, experts=[])


class Source(Protocol):
    """A folder that was trained or exported."""

    where: str
    """The folder, for messages."""
    recipe: Recipe
    base_digest: str
    """Digest of the base that the leaves belong to."""
    clients: dict[str, str]
    """Model name -> client, for those whose own leaves are here."""
    has_shared: bool
    """Whether there is a model `shared`."""
    first: str
    """The model to begin with."""
    notes: tuple[str, ...]
    """What a user should know and need not act on."""

    def prediction(self, name: str, model: GraftedModel) -> Prediction:
        """The leaves of a model of `clients`, or of `shared`, as they were evaluated.

        Raises:
            ValueError: it cannot be used as a live model; says why.
        """

    def about(self, name: str) -> dict[str, Any]:
        """What the card of a model says; JSON."""

    def why_not(self, name: str) -> str:
        """Why there is no model of this name, where more is known than that; else empty."""


def check_name(source: Source, name: str) -> None:
    """There is such a model.

    Raises:
        ValueError: there is none; names those there are.
    """
    known = names(source)
    if name not in known:
        why = source.why_not(name)
        raise ValueError(f"{source.where}: no model {name!r}{why or plugins.nearest(name, known)}; models: {', '.join(known)}")


def names(source: Source) -> list[str]:
    """Every model, `base` first."""
    return [BASE, *([SHARED] if source.has_shared else []), *source.clients]


def named(clients: Sequence[str]) -> dict[str, str]:
    """Model name -> client; a client called as a model that is no client's gets an underscore."""
    return {f"{client}_" if client in {BASE, SHARED} else client: client for client in clients}


def own_recipe(values: str | Mapping[str, object], overrides: Sequence[str]) -> Recipe:
    """The recipe by path or values, with the base loaded another way.

    Raises:
        ValueError: an override of anything but `model`, which would make it another run.
    """
    for override in overrides:
        if not override.startswith("model."):
            raise ValueError(f"--set {override}: only keys of model can be set here, the rest is as it was trained")
    return load_recipe(dict(values) if isinstance(values, Mapping) else values, list(overrides))
