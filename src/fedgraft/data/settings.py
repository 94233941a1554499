"""The recipe section `data`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedgraft.settings import Section


class DataSettings(Section):
    """What the clients hold and how it becomes tokens."""

    dataset: str = "dolly"
    """Name of the dataset: a module of `fedgraft.data.datasets`."""

    path: str | None = None
    """Where the dataset lies: for `dolly` the full set's file (none: the shipped sample), for `jsonl` a file or a folder."""

    partition: Literal["category", "dirichlet", "iid", "files"] = "category"
    """How rows are divided: one client per category, Dirichlet mixtures of them, evenly at random, or one client per file of `path`."""

    clients: int = Field(default=4, ge=1)
    """Number of clients of `dirichlet` and `iid`; the other partitions find theirs in the data."""

    categories: Annotated[list[str], Field(min_length=1)] | None = None
    """Categories to keep (none: all)."""

    alpha: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Concentration of `dirichlet`: the smaller, the fewer categories a client has."""

    overlap: bool = False
    """`dirichlet` draws with replacement, as the sampler released with FLEx does, so that clients share rows; off: disjoint clients."""

    train_rows: int | None = Field(default=None, ge=1)
    """Training rows per client: exact for `category`, `dirichlet` and `iid`, an upper limit for `files` (none: all)."""

    validation_rows: int | None = Field(default=None, ge=0)
    """Validation rows per client, in the same sense; 0 for none."""

    test_rows: int | None = Field(default=None, ge=0)
    """Test rows per client, in the same sense; 0 for none."""

    name: str | None = None
    """With `files`: all of `path`, a file or a folder, is one client of this name (none: one client per file or subfolder)."""

    template: Literal["chat", "alpaca"] = "chat"
    """Wording around instruction and response: the tokenizer's own chat template, or Stanford Alpaca's."""

    max_length: int = Field(default=512, ge=16)
    """Longest row in tokens; the context is cut first, from its end."""

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if self.name is not None and self.partition != "files":
            raise ValueError(f"name: {self.name!r} names the one client of partition: files; set partition to that, or leave it out")
        return self
