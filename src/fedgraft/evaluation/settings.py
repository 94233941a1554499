"""What is measured after the last round."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedgraft.settings import Section


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
    """Also generate answers greedily and score ROUGE-L."""
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
    tasks: tuple[str, ...] = ()
    """Multiple-choice tasks by log-likelihood: `arc_easy_sample`, which is shipped, or JSON-lines files of {question, choices, answer}."""
    lm_eval: tuple[str, ...] = ()
    """Tasks that lm-eval (extra `eval`) measures on the same models: its names, or task files in YAML."""
    task_rows: int | None = Field(default=None, ge=1)
    """At most so many rows of each task; empty: all."""
    task_models: tuple[Literal["base", "shared", "trained", "personal"], ...] = ("base", "personal")
    """Models that are asked the tasks."""
