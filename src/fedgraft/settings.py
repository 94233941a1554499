"""The base of every recipe section. Each layer defines the section it reads; `recipe.py` only composes them."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Immutable, strict about unknown keys; attribute docstrings become the reference."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
"""The share of a running mean that is kept; an option of many methods."""
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole."""
