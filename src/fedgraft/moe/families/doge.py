"""Not supported: its experts are single rows of two embedding tables, looked up by product keys, so there is no expert to copy."""

from __future__ import annotations

from torch import nn

from fedgraft.moe.family import Family
from fedgraft.moe.site import Site


def sites(model: nn.Module) -> list[Site]:
    """Refuse.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{type(model).__name__}: {__doc__}")


FAMILY = Family(sites=sites)
