"""Loading a run or an export as a live model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fedgraft.grafts.graft import GraftedModel
from fedgraft.handover.found import ABOUT
from fedgraft.handover.start import start_of
from fedgraft.moe.load import load_base
from fedgraft.use.exported import ExportSource
from fedgraft.use.loaded import Loaded
from fedgraft.use.run import RunSource
from fedgraft.use.source import Source, check_name


def load(folder: str | Path, client: str | None = None, *, overrides: Sequence[str] = ()) -> Loaded:
    """A live transformers model that predicts as a client of a run does, or as the model of an export.

    Needs the base, but no client's rows. Of a run that is not finished the last committed leaves are used, with a warning.

    Args:
        folder: a run folder, or one that `fedgraft export --as fedgraft` wrote.
        client: the model to begin with: a client, `shared` (the aggregated leaves) or `base`; None: `base`, or the model of the export.
        overrides: `model.<key>=<value>`, where the base lies elsewhere now or is to be loaded in another way.

    Raises:
        ValueError: no run or export, a run that has not begun, no such model (names those there are), no such base, or
            another than the leaves are of.
    """
    folder = Path(folder)
    source: Source = (ExportSource if (folder / ABOUT).is_file() else RunSource)(folder, overrides)
    check_name(source, client or source.first)
    for note in source.notes:
        warnings.warn(note, stacklevel=2)
    return Loaded(source, grafted(source)).use(client or source.first)


def grafted(source: Source) -> GraftedModel:
    """The base with places for the leaves.

    Raises:
        ValueError: as `load_base`, or another base than the leaves belong to.
    """
    recipe = source.recipe
    base = load_base(recipe.model)
    if base.digest != source.base_digest:
        raise ValueError(
            f"{source.where}: its leaves belong to another base than {recipe.model.name!r} is now (digest {source.base_digest[:12]}, "
            f"here {base.digest[:12]}); restore that, or name a copy of it: model.name=<folder>"
        )
    return GraftedModel(base, recipe.lora, recipe.graft, partial(start_of, recipe.lora, base, base.digest, recipe.seed))
