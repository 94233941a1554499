"""What a run promises and has spent: the coordinator's side of both kinds of differential privacy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedgraft.methods.method import Method
from fedgraft.transforms import noise
from fedgraft.transforms.accountant import check_installed, epsilon
from fedgraft.transforms.client_privacy import CLIP, WITHIN, Terms, protected
from fedgraft.transforms.noise import Noise
from fedgraft.transforms.privacy import ClientPrivacy, ExamplePrivacy, NoPrivacy, Planned
from fedgraft.transforms.secure_aggregation.contribution import Contribution

WHAT = {"client": "clients", "examples": "rows"}


@dataclass(kw_only=True)
class Guarantee:
    """The guarantee of one run."""

    recipe: Planned
    folder: Path
    seed: int
    """The recipe's."""
    sites: list[str]
    """Who trains."""
    rows: Callable[[], Mapping[str, int]]
    """Training rows of each of them; read only where they count."""
    steps: int
    """Optimiser steps of a round, at most."""

    def __post_init__(self) -> None:
        settings = self.recipe.privacy
        if isinstance(settings, NoPrivacy):
            return
        if settings.noise_multiplier > 0:
            check_installed()
        if self.secret and (self.folder / "state").exists() and noise.kept(self.folder) is None:
            raise ValueError(f"{self.folder / noise.SECRET}: missing, so the noise of this run cannot go on; restore it from a copy")

    @property
    def afar(self) -> bool:
        """Sites are elsewhere."""
        return bool(self.recipe.engine.name == "flower")

    @property
    def secret(self) -> bool:
        """The coordinator's noise comes from a secret of the run folder."""
        settings = self.recipe.privacy
        if not isinstance(settings, ClientPrivacy):
            return False
        return self.afar if settings.secret is None else settings.secret

    @property
    def measured(self) -> bool:
        """Clients send the figures of their evaluation."""
        settings = self.recipe.privacy
        return isinstance(settings, NoPrivacy) or not self.afar or settings.figures

    @property
    def due(self) -> tuple[str, ...]:
        """Facts that a reply to `train` cannot do without."""
        settings = self.recipe.privacy
        if not isinstance(settings, ClientPrivacy):
            return ("examples",)
        return () if settings.quantile is None else (WITHIN,)

    @cached_property
    def noise(self) -> Noise:
        """The coordinator's."""
        if not self.secret:
            return noise.seeded(self.seed, "coordinator")
        return noise.kept(self.folder) or noise.drawn()

    @property
    def sampling_seed(self) -> int:
        """Who takes part follows from it: of the secret where clients, who know the recipe, must not work out who is in a round."""
        return self.noise.seed("sampling") if self.secret else self.seed

    def begin(self) -> None:
        """Write the secret before anything that it makes is released."""
        if self.secret and noise.kept(self.folder) is None:
            noise.keep(self.folder, self.noise)

    def protect(self, method: Method) -> Method:
        """The method with the coordinator's half of the protection.

        Raises:
            ValueError: the settings do not fit so many clients.
        """
        return protected(self.terms, method) if self.terms is not None else method

    @cached_property
    def terms(self) -> Terms | None:
        """What clients' changes are merged by; None where they are not noised."""
        settings, expected = self.recipe.privacy, self.recipe.federation.clients_of(len(self.sites))
        if not isinstance(settings, ClientPrivacy):
            return None
        return Terms(settings=settings, expected=expected, noise=self.noise, masked=self.contribution is not None)

    @property
    def contribution(self) -> Contribution | None:
        """What a client may contribute to the sum that alone is seen; None where clients' changes are not noised, or are seen."""
        return None if self.recipe.secure_aggregation.name == "none" else Contribution.of(self.recipe.privacy)

    @cached_property
    def rates(self) -> Mapping[str, float]:
        """Client -> the probability with which what is protected is in a step; the same for all under `client`."""
        settings, federation = self.recipe.privacy, self.recipe.federation
        if isinstance(settings, ExamplePrivacy):
            return {name: min(1.0, self.recipe.training.batch_size / rows) for name, rows in self.rows().items()}
        sampled = isinstance(settings, ClientPrivacy) and federation.sampling == "poisson"
        return dict.fromkeys(self.sites, federation.clients_of(len(self.sites)) / len(self.sites) if sampled else 1.0)

    @cached_property
    def rate(self) -> float:
        """The largest of `rates`."""
        return max(self.rates.values())

    def spent(self, rounds: int, state: Mapping[str, Any]) -> dict[str, Any]:
        """What so many rounds have spent, for the record: `epsilon` (of rows: the largest of any client; null: no bound) at `delta`.

        Args:
            rounds: finished ones.
            state: facts of the coordinator's, whose clip is told where it follows the clients.
        """
        settings = self.recipe.privacy
        if isinstance(settings, NoPrivacy):
            return {}
        told = {"of": WHAT[settings.name], "epsilon": self._epsilon(self.rate, rounds), "delta": settings.delta}
        return told | (
            {CLIP: state.get(CLIP, settings.clip)} if isinstance(settings, ClientPrivacy) and settings.quantile is not None else {}
        )

    def result(self, rounds: int, state: Mapping[str, Any]) -> dict[str, Any]:
        """What the whole run has spent, with what it was computed from; {} without privacy."""
        settings = self.recipe.privacy
        if isinstance(settings, NoPrivacy):
            return {}
        further: dict[str, Any] = {"noise_multiplier": settings.noise_multiplier, "seeded": not self._all_secret}
        if isinstance(settings, ExamplePrivacy):
            further["clients"] = {name: self._epsilon(rate, rounds) for name, rate in self.rates.items()}
        else:
            further["rate"] = self.rate
        return {"privacy": self.spent(rounds, state) | {"rounds": rounds} | further}

    def lines(self) -> list[tuple[str, str]]:
        """What the whole run will spend, for the screen before training."""
        settings, rounds = self.recipe.privacy, self.recipe.federation.rounds
        if isinstance(settings, NoPrivacy):
            return []
        found = self.spent(rounds, {})
        if found["epsilon"] is None:
            return [("privacy", "no guarantee: without a clip and noise epsilon has no bound")]
        often = "in every one" if self.rate == 1 else f"in each with probability {self.rate:.3g}"
        steps = "rounds" if isinstance(settings, ClientPrivacy) else f"steps of {rounds} rounds"
        text = f"epsilon {found['epsilon']:.3g} at delta {settings.delta:g} for {found['of']}, after {self._steps(rounds)} {steps}, {often}"
        return [("privacy", text + ("" if self._all_secret else "; noise from the recipe's seed, as befits a simulation"))]

    def note(self, question: str, round_number: int) -> str:
        """What will be spent with the round in hand, in a few words; "" without privacy or a bound, and of what is no training."""
        found = self.spent(round_number + 1, {}).get("epsilon") if question == "train" else None
        return f"epsilon {found:.3g}" if found is not None else ""

    @property
    def _all_secret(self) -> bool:
        settings = self.recipe.privacy
        return not isinstance(settings, NoPrivacy) and (self.afar if settings.secret is None else settings.secret)

    def _steps(self, rounds: int) -> int:
        return rounds if isinstance(self.recipe.privacy, ClientPrivacy) else rounds * self.steps

    def _epsilon(self, rate: float, rounds: int) -> float | None:
        settings = self.recipe.privacy
        assert not isinstance(settings, NoPrivacy)
        multiplier = settings.noise_multiplier if settings.clip is not None else 0.0
        found = epsilon(noise_multiplier=multiplier, rate=rate, steps=self._steps(rounds), delta=settings.delta)
        return found if math.isfinite(found) else None
