"""A client as methods see it: its name, rows, memory and the calls it may make. One at a time, or a cohort, is alive in a process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fedgraft import seeds
from fedgraft.bundle import Bundle
from fedgraft.data.batches import Batch, Row, by_length, collate, encode, round_rows
from fedgraft.data.calibration import generic_rows, in_batches, own_rows
from fedgraft.data.example import Example
from fedgraft.data.partition import ClientData
from fedgraft.data.settings import DataSettings
from fedgraft.grafts.graft import Experts, GraftedModel
from fedgraft.grafts.side_expert import Mixture
from fedgraft.selection.profile import Profile
from fedgraft.selection.settings import SelectionSettings
from fedgraft.training.fit import Fit, GradientHook, NotFiniteError, Passes, Penalty, RowGradients, alone, fit
from fedgraft.training.settings import TrainingSettings
from fedgraft.tree import Tree


class Report(Protocol):
    """Hears how far a client is with what it was asked, for people who wait; without effect on the result."""

    def __call__(self, done: int, total: int, loss: float | None = None, note: str = "") -> None:
        """`done` of `total` parts, the current training loss, what is being worked on."""


class ByRows(Protocol):
    """How a client trains by single rows in the round in hand (DP-SGD)."""

    def chosen(self, step: int, count: int, expected: int) -> list[int]:
        """Which of `count` rows are in a step; `expected` on average."""

    def gradients(self, expected: int) -> RowGradients:
        """What the gradients of rows go through in one fit, with so many rows a step on average."""


def unheard(done: int, total: int, loss: float | None = None, note: str = "") -> None:
    """Nobody waits."""


@dataclass(kw_only=True)
class Client:
    """What a method may touch on a site. `memory` is all that lasts between questions; it never leaves the site."""

    data: ClientData
    model: GraftedModel
    seed: int
    data_settings: DataSettings
    training: TrainingSettings
    selection: SelectionSettings
    memory: Bundle = field(default_factory=Bundle)
    truncated: int = 0
    """Rows cut to `data.max_length` since the client was opened."""
    by_rows: ByRows | None = None
    """Set where single rows are protected."""
    report: Report = unheard
    """Hears of training steps, calibration tokens and evaluated models."""
    passes: Passes = alone
    """How its forward and backward passes are run."""
    generic: list[Profile] = field(default_factory=list)
    """What generic text said about the experts, once a client of this process has calibrated on it; shared with the others."""

    @property
    def name(self) -> str:
        """The client's name, also the name of its folder."""
        return self.data.name

    @property
    def examples(self) -> int:
        """Number of training rows, the weight of FedAvg."""
        return len(self.data.train)

    @property
    def experts(self) -> Experts:
        """Source experts of its grafts [L][r]; empty before selection."""
        experts: Any = self.memory.facts.get("experts", [])
        return [list(chosen) for chosen in experts]

    @property
    def mixture(self) -> Mixture:
        """What its graft starts as a mean of, per layer; empty for copies."""
        parts: Any = self.memory.facts.get("mixture", [])
        return [[(int(expert), float(share)) for expert, share in layer] for layer in parts]

    def remember(self, *, trees: Mapping[str, Tree], facts: Mapping[str, Any] | None = None) -> None:
        """Replace the named trees and facts of the memory; the others stay."""
        self.memory = Bundle(trees={**self.memory.trees, **trees}, facts={**self.memory.facts, **(facts or {})})

    def batches(self, round_number: int) -> list[list[Batch]]:
        """The batches of one round, a function of seed, client and round: a list of `accumulation` parts for every step it does there.

        With unequal local work (`training.least_steps`) they are the first of its `training.steps` steps; `training.group_by_length` then
        sorts the rows of those into steps anew.
        """
        whole = self.training.steps * self.training.batch_size
        per_round = self.training.steps_of(self.seed, round_number, self.name) * self.training.batch_size
        if self.by_rows is not None:
            return self._drawn(self.by_rows, per_round // self.training.batch_size)
        order = round_rows(self.examples, whole, round_number, self.seed, self.name)[:per_round]
        rows = [self._row(self.data.train[index]) for index in order]
        size = self.training.batch_size
        part = -(-size // self.training.accumulation)
        if self.training.group_by_length:
            steps = by_length(rows, size, seeds.numpy_rng(self.seed, "lengths", self.name, round_number))
        else:
            steps = [rows[start : start + size] for start in range(0, per_round, size)]
        pad = self.model.base.pad_id
        return [[collate(step[at : at + part], pad) for at in range(0, len(step), part)] for step in steps]

    def _drawn(self, by_rows: ByRows, steps: int) -> list[list[Batch]]:
        """Steps of rows that are drawn independently, each a part of its own; a step may have none."""
        chosen = [by_rows.chosen(step, self.examples, self._per_step) for step in range(steps)]
        return [[collate([self._row(self.data.train[index])], self.model.base.pad_id) for index in step] for step in chosen]

    @property
    def _per_step(self) -> int:
        return min(self.training.batch_size, self.examples)

    def calibration(self) -> Iterator[Batch]:
        """Batches with the tokens that experts are chosen by: its own prompt + response text, or generic text (`selection.text`)."""
        base, length = self.model.base, self.data_settings.max_length
        own = self.selection.text == "own"
        rows = own_rows(self.data.train, self._row, self.seed, self.name) if own else generic_rows(base.tokenizer, length, self.seed)
        for batch in in_batches(rows, self.selection.budget(base.device.type), length, base.pad_id):
            yield batch.to(base.device)

    def fit(
        self,
        trained: Mapping[str, Tensor],
        *,
        round_number: int,
        lr: float,
        fixed: Mapping[str, Tensor] | None = None,
        penalty: Penalty | None = None,
        on_gradients: GradientHook | None = None,
        moments: Mapping[str, Tree] | None = None,
        purpose: str = "fit",
        steps: list[list[Batch]] | None = None,
    ) -> Fit:
        """`training.fit` on this round's batches, or on those of `steps`.

        Raises:
            NotFiniteError: naming the client; its memory is untouched.
        """
        try:
            return fit(
                self.model,
                trained,
                self.batches(round_number) if steps is None else steps,
                self.training,
                lr=lr,
                seed=seeds.derive(self.seed, purpose, round_number, self.name),
                experts=self.experts,
                fixed=fixed,
                penalty=penalty,
                on_gradients=on_gradients,
                moments=moments,
                report=self.report,
                passes=self.passes,
                by_rows=None if self.by_rows is None else self.by_rows.gradients(self._per_step),
            )
        except NotFiniteError as error:
            raise NotFiniteError(f"client {self.name!r}, round {round_number + 1}: {error}") from error

    def _row(self, example: Example) -> Row:
        settings = self.data_settings
        row, cut = encode(example, self.model.base.tokenizer, settings.template, settings.max_length)
        self.truncated += cut
        return row


class MemoryStore:
    """Client memories on disk: `<folder>/<client>/memory-<version>.safetensors`.

    Version v is what the client knew after ask number v - 1. The newest version that the coordinator has committed is kept beside newer
    ones, so a coordinator that went back to its last commit finds the memory that belongs to it; and so is the one that the newest came
    from, so that a question whose reply was lost can be asked again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, client: str, at_most: int) -> Bundle:
        """The newest memory of a version not above `at_most`; an empty one before the first."""
        versions = [version for version in self.versions(client) if version <= at_most]
        return Bundle.load(self._path(client, max(versions))) if versions else Bundle()

    def save(self, client: str, version: int, memory: Bundle, committed: int) -> None:
        """Write one version; drop those that neither the commit nor this write needs."""
        memory.save(self._path(client, version))
        versions = self.versions(client)
        needed = {version, *(max((old for old in versions if old <= most), default=version) for most in (committed, version - 1))}
        for old in versions:
            if old not in needed:
                self._path(client, old).unlink()

    def versions(self, client: str) -> list[int]:
        """Versions on disk, ascending."""
        return sorted(int(path.stem.removeprefix("memory-")) for path in (self.folder / client).glob("memory-*.safetensors"))

    def _path(self, client: str, version: int) -> Path:
        return self.folder / client / f"memory-{version:07d}.safetensors"
