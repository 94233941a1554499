"""What is measured after the last round."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from fedgraft.settings import Section


class UnseenSettings(Section):
    """Clients that the federation never asks; afterwards they receive the shared leaves and adapt them to some of their rows."""

    clients: NonNegativeInt | list[str] | Literal["all"] = 0
    """How many, drawn by the seed, or which. `all`: nobody is held out, and every client is new to the shared leaves because they are
    not trained here (`method.frozen_shared`)."""
    rows: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 10, 30, 100)
    """Training rows that they adapt with, each number by itself; 0: the shared leaves as they are."""
    rounds: int = Field(default=5, ge=1)
    """Rounds' worth of local steps with these rows, at `training.lr`."""
    passes: int | None = Field(default=None, ge=1)
    """In the place of `rounds`: as many as make so many passes over the rows, which few rows are not overfitted by; rounded up."""

    def rounds_of(self, rows: int, each: int) -> int:
        """Rounds for a number of rows, `each` of which are seen in a round."""
        return self.rounds if self.passes is None else max(1, math.ceil(self.passes * rows / each))

    @model_validator(mode="after")
    def _no_number_twice(self) -> Self:
        if len(set(self.rows)) < len(self.rows):
            raise ValueError(f"rows names a number twice: {list(self.rows)}")
        return self


class EvaluationSettings(Section):
    """Evaluation of every client on its own held-out rows."""

    models: tuple[Literal["base", "shared", "trained", "personal"], ...] = ("base", "shared", "trained", "personal")
    """`base`: untouched; `shared`: aggregated leaves alone; `trained`: personal before aggregation; `personal`: after it."""
    split: Literal["validation", "test"] = "test"
    """Which rows; choose anything by validation only."""
    rows: int | None = Field(default=None, ge=1)
    """At most so many rows per client for loss and accuracy; empty: all."""
    batch_size: int = Field(default=16, ge=1)
    """Rows per forward."""
    generate: bool = True
    """Also generate answers greedily and score ROUGE-L, and exact matches where dataset or row asks for them."""
    generate_rows: int = Field(default=25, ge=1)
    """Rows per client to generate for."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest generated answer."""
    generate_models: tuple[Literal["base", "shared", "trained", "personal"], ...] = ("base", "personal")
    """Models that generate."""
    knowledge_tokens: int = Field(default=8192, ge=0)
    """Tokens of held-out general text for the perplexity that shows what knowledge was kept; 0 leaves it out."""
    knowledge_models: tuple[Literal["base", "shared", "trained", "personal"], ...] = ("base", "personal")
    """Models whose general perplexity is measured."""
    resamples: int = Field(default=1000, ge=0)
    """Bootstrap resamples behind each 95 % interval; 0: no intervals."""
    experts: bool = True
    """Also measure what gates, grafts and routers do on the first rows (at most 64), beside the untouched base."""
    cross: bool = False
    """Also measure every client's personal model on every other client's rows. Personal leaves are lent for that, so clients must run in
    this process."""
    unseen: UnseenSettings = UnseenSettings()
    """Clients held out of the federation, by number or name, that adapt the shared leaves to 0, 10, ... of their own training rows."""
    tasks: tuple[str, ...] = ()
    """Multiple-choice tasks by log-likelihood: `arc_easy_sample`, which is shipped, or JSON-lines files of {question, choices, answer}."""
    lm_eval: tuple[str, ...] = ()
    """Tasks that lm-eval (extra `eval`) measures on the same models: its names, or task files in YAML."""
    task_rows: int | None = Field(default=None, ge=1)
    """At most so many rows of each task; empty: all."""
    task_models: tuple[Literal["base", "shared", "trained", "personal"], ...] = ("base", "personal")
    """Models that are asked the tasks."""
