"""A live model: one base in memory, and the leaves of many models that take turns on it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from fedgraft.data.batches import prompt_ids
from fedgraft.data.example import Example
from fedgraft.data.templates import end_id
from fedgraft.grafts.graft import Fitted, GraftedModel
from fedgraft.grafts.rows import FittedRows, Rows
from fedgraft.methods.method import Prediction
from fedgraft.training.fit import autocast
from fedgraft.use.prompts import example_of
from fedgraft.use.source import BASE, UNTOUCHED, Source, check_name, names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLIMITED = 1 << 20
"""Tokens of a prompt where the base states no limit."""
LEAST = 16
"""Tokens that are left for a prompt at least."""


class Loaded:
    """A transformers model that predicts as one of several models; which, is switched by pointer.

    One model is in use at a time. `use` is for a program with one thread. With several, whatever needs a certain model goes into
    `with loaded.using(name):`, which holds a lock, so that others wait; nothing of the transformers model may run outside then.
    """

    def __init__(self, source: Source, grafted: GraftedModel) -> None:
        """Make the base predict in the run's precision and stop where its answers stop."""
        self.source, self.grafted = source, grafted
        base = grafted.base
        self.model: Any = base.model
        """The transformers model; its `generate` ends at the token that closed the responses in training."""
        self.tokenizer: PreTrainedTokenizerBase = base.tokenizer
        self.end_id = end_id(base.tokenizer, source.recipe.data.template)
        """The token that closes an answer."""
        self.model.generation_config.eos_token_id = self.end_id
        self.model.generation_config.pad_token_id = base.pad_id
        _compute_in(self.model, source.recipe.training.precision, base.device)
        self._predictions: dict[str, Prediction] = {BASE: UNTOUCHED}
        self._fitted: dict[str, Fitted] = {}
        settings = source.recipe.model
        self._keeps_fitted = settings.quantise == "none" and settings.device_map is None  # else it would hold copies of experts
        self._lock, self._blocks = threading.RLock(), 0
        self._current: Fitted | FittedRows = Fitted()
        self._name = BASE
        self._mixed: tuple[list[str], Rows] | None = None

    @property
    def models(self) -> list[str]:
        """Every name that `use` takes: `base`, `shared` where there is one, and the clients."""
        return names(self.source)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known about the leaves and the base, and needs nothing done."""
        return (*self.source.notes, *self.grafted.base.notes)

    @property
    def client(self) -> str:
        """The name of the model in use."""
        return self._name

    @property
    def mixes(self) -> bool:
        """Whether the rows of one batch can be of different models (`rows`).

        Not where routers or routed experts are adapted, which is in use for all rows, nor on a quantised or offloaded base.
        """
        return self._keeps_fitted and not {"router", "experts"} & {*self.source.recipe.lora.targets}

    @property
    def longest(self) -> int | None:
        """Tokens that the base can hold, prompt and answer; None where its configuration does not say."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return int(limit) if limit is not None else None

    def prediction(self, client: str) -> Prediction:
        """Leaves and source experts of a model, the leaves where their layers compute; read from disk when first asked for.

        Raises:
            ValueError: there is no such model, or it cannot be used as a live one; says why.
        """
        with self._lock:
            if client not in self._predictions:
                check_name(self.source, client)
                found = self.source.prediction(client, self.grafted)
                self._predictions[client] = replace(found, tree=self.grafted.placed(found.tree))
            return self._predictions[client]

    def fitted(self, client: str) -> Fitted:
        """The leaves of a model at their places.

        Raises:
            ValueError: as `prediction`.
        """
        with self._lock:
            if client in self._fitted:
                return self._fitted[client]
            model = self.prediction(client)
            found = self.grafted.fitted(model.tree, model.experts)
            if self._keeps_fitted:
                self._fitted[client] = found
            self.grafted.put(self._current)  # looking them up has taken those in use away
            return found

    def use(self, client: str) -> Self:
        """Predict with this model from here on.

        Raises:
            ValueError: as `prediction`, or inside a block of `using`.
        """
        with self._lock:
            if self._blocks:
                raise ValueError(f"use({client!r}) inside a block of using({self._name!r}); open another block of using there")
            self._switch(client)
        return self

    @contextmanager
    def using(self, client: str) -> Iterator[Any]:
        """Predict with this model inside the block, which gets the transformers model; other threads wait for its end.

        Raises:
            ValueError: as `prediction`.
        """
        with self._lock:
            before = self._name
            self._switch(client)
            self._blocks += 1
            try:
                yield self.model
            finally:
                self._blocks -= 1
                self._switch(before)

    @contextmanager
    def rows(self, clients: Sequence[str]) -> Iterator[Any]:
        """Predict row i of every batch inside the block with model `clients[i]`; other threads wait for its end.

        In one forward over the shared base, in evaluation mode. The low-rank pairs of the clients named last are kept stacked.

        Raises:
            ValueError: as `prediction`; or several models, and not `mixes`.
        """
        with self._lock, self.using(clients[0]) as model:
            names = list(dict.fromkeys(clients))
            if len(names) > 1:
                if not self.mixes:
                    raise ValueError(f"{', '.join(names)} can't stand in one batch: what they adapt is in use for all of its rows")
                if self._mixed is None or not {*names} <= {*self._mixed[0]}:
                    self._mixed = names, self.grafted.side_by_side([self.fitted(name) for name in names])
                known, stacked = self._mixed
                self._current = stacked.of([known.index(name) for name in clients])
                self.grafted.put(self._current)
            yield model

    def prompt(self, said: str | Sequence[Mapping[str, str]] | Example, longest: int | None = None) -> list[int]:
        """The tokens after which the answer begins, with the words around it that the run was trained with.

        Args:
            said: one instruction, chat messages (`role`, `content`), the last of them the user's, or a row.
            longest: most tokens; the context from its end, the oldest turns and then the end of the instruction are cut.

        Raises:
            ValueError: no user's message at the end, or turns that the run's template cannot hold.
        """
        limit = longest or self.longest or UNLIMITED
        row = said if isinstance(said, Example) else example_of(said)
        return prompt_ids(row, self.tokenizer, self.source.recipe.data.template, limit)

    def room(self, new_tokens: int) -> int:
        """Most tokens of a prompt that leaves room for so many new ones.

        Raises:
            ValueError: there would be hardly any.
        """
        if self.longest is None:
            return UNLIMITED
        if self.longest - new_tokens < LEAST:
            raise ValueError(
                f"{new_tokens} new tokens leave no room for a prompt: {self.grafted.base.name} holds {self.longest}; ask for at most "
                f"{self.longest - LEAST}"
            )
        return self.longest - new_tokens

    def decode(self, ids: Sequence[int]) -> str:
        """The answer's text, without the token that closes it or white space around it."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def close(self) -> None:
        """Leave the base untouched, with no leaves in memory; safe to call again."""
        with self._lock:
            self._switch(BASE)
            self._predictions, self._fitted, self._mixed = {BASE: UNTOUCHED}, {}, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _switch(self, client: str) -> None:
        self._current, self._name = self.fitted(client), client
        self.grafted.put(self._current)  # no block of `GraftedModel.using`: it would end once nobody but the model's user is left


def _compute_in(model: Any, precision: str, device: Any) -> None:
    """Run every forward in the precision that the run trained and was evaluated in."""
    if precision == "fp32":
        return
    forward = model.forward

    @functools.wraps(forward)  # `generate` reads its signature
    def within(*args: Any, **kwargs: Any) -> Any:
        with autocast(precision, device):
            return forward(*args, **kwargs)

    model.forward = within
