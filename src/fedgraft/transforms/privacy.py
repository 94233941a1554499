"""Differential privacy: what a recipe can ask for, what refuses it, and what replies may still tell.

Two kinds, one at a time. `client`: nobody can tell from the shared leaves whether a client took part at all (`client_privacy.py`).
`examples`: nobody can tell from a client's leaves whether a row was among its rows (`example_privacy.py`). In both, neighbours differ in
one client or row that contributes nothing in the place of what it would; names of clients and divisors stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeAlias

from pydantic import Field

from fedgraft.address import everything
from fedgraft.aggregation.merges import MEANS
from fedgraft.aggregation.replies import as_packed, no_leaves
from fedgraft.aggregation.settings import FederationSettings
from fedgraft.bundle import Bundle
from fedgraft.methods.method import Method, absorb_updates, nothing_to_finish, open_run
from fedgraft.selection.settings import SelectionSettings
from fedgraft.settings import Section
from fedgraft.training.client import Client
from fedgraft.training.settings import TrainingSettings
from fedgraft.transforms.compression import CompressionSettings, NoCompression

Question: TypeAlias = Callable[[Client, Bundle], Bundle]
MEASURING = frozenset({"evaluate", "evaluate_unseen", "lend", "borrow"})
"""Questions that exist to learn figures of a client's models."""


class NoPrivacy(Section):
    """Shared leaves are sent and merged as training left them."""

    name: Literal["none"] = "none"
    """`none`; `client`: the shared leaves do not show whether a client took part; `examples`: a client's leaves do not show whether a row
    was among its own (DP-SGD)."""


class _Noised(Section):
    clip: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Largest Euclidean norm of what one client (`client`) or one row in one step (`examples`) contributes; a longer contribution is scaled
    down to it. Empty: no bound, and so no guarantee."""
    noise_multiplier: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Standard deviation of the Gaussian noise on the sum of contributions, in units of `clip`. 0: no noise, and so no guarantee."""
    delta: float = Field(default=1e-5, gt=0, lt=1)
    """The delta at which epsilon is told; well below one divided by how many clients (`client`) or rows (`examples`) there are."""
    secret: bool | None = None
    """Noise and the choice of who takes part come from secrets of the operating system (files `noise.key`, for their owner's eyes only);
    off: from the recipe's `seed`, so that whoever has the recipe can take the noise away. Empty: secrets where sites are elsewhere, the
    seed in simulations."""
    figures: bool = False
    """Sites elsewhere send the figures of their evaluation, which no noise covers. In one process they are measured in any case."""


class ClientPrivacy(_Noised):
    """Clients' changes of the shared leaves are clipped, summed and noised (McMahan et al. 2018); all clients weigh the same."""

    name: Literal["client"] = "client"
    where: Literal["server", "clients"] = "server"
    """Who adds the noise: the coordinator, which is trusted; or every client a share of it, for a coordinator that sees sums alone
    (`secure_aggregation`)."""
    least: int = Field(default=0, ge=0)
    """With `where: clients`: so many shares together are the whole noise, and a round with fewer replies is not merged."""
    quantile: float | None = Field(default=None, gt=0, lt=1)
    """The clip follows this quantile of the norms of the clients' changes, beginning at `clip` (Andrew et al. 2021). Empty: it stays."""
    quantile_lr: float = Field(default=0.2, gt=0)
    """How fast it follows: clip times exp(-`quantile_lr` (share within - quantile))."""
    quantile_noise: float | None = Field(default=None, gt=0)
    """Standard deviation of the noise on how many clients were within the clip. Empty: a twentieth of the clients of a round, at least
    `noise_multiplier`. The changes get so much more noise that both together are worth `noise_multiplier`."""
    told: ClassVar[frozenset[str]] = frozenset({"within"})

    @property
    def shares(self) -> int:
        """Replies whose shares make the whole noise; 0 where the coordinator adds it."""
        return self.least if self.where == "clients" else 0


class ExamplePrivacy(_Noised):
    """Gradients of single rows are clipped, summed and noised in every step (DP-SGD; Abadi et al. 2016); rows are drawn independently."""

    name: Literal["examples"] = "examples"
    told: ClassVar[frozenset[str]] = frozenset({"examples"})


PrivacySettings: TypeAlias = Annotated[NoPrivacy | ClientPrivacy | ExamplePrivacy, Field(discriminator="name")]


class Planned(Protocol):
    """What is read of a recipe."""

    @property
    def privacy(self) -> NoPrivacy | ClientPrivacy | ExamplePrivacy:
        """What is asked for."""

    @property
    def federation(self) -> FederationSettings:
        """Who takes part, and the merge."""

    @property
    def compression(self) -> CompressionSettings:
        """How changes are coded."""

    @property
    def attack(self) -> Any:
        """Which clients are hostile, in a simulation."""

    @property
    def secure_aggregation(self) -> Any:
        """Whether replies are masked."""

    @property
    def training(self) -> TrainingSettings:
        """How a client trains."""

    @property
    def selection(self) -> SelectionSettings:
        """How experts are chosen."""

    @property
    def engine(self) -> Any:
        """Where clients run."""

    @property
    def evaluation(self) -> Any:
        """What is measured."""


def check_privacy(recipe: Planned, method: Method, name: str) -> None:
    """Refuse what would void the guarantee, before anything is loaded.

    Args:
        recipe: the run's.
        method: with the recipe's merge.
        name: of the method.

    Raises:
        ValueError: it would; says why, and what to set.
    """
    settings = recipe.privacy
    if isinstance(settings, NoPrivacy):
        return
    why = _unbounded(settings, recipe) or (
        _not_of_clients(settings, recipe, method, name) if isinstance(settings, ClientPrivacy) else _not_of_rows(recipe, method, name)
    )
    if why:
        raise ValueError(f"privacy.{why}")


def _unbounded(settings: ClientPrivacy | ExamplePrivacy, recipe: Planned) -> str:
    return _first(
        (settings.noise_multiplier > 0 and settings.clip is None)
        and "clip: noise is measured in units of the clip; set one, or noise_multiplier to 0",
        (settings.secret is False and recipe.engine.name == "flower")
        and "secret: sites elsewhere know the recipe and its seed, and with that all noise; leave it out",
        recipe.engine.keep_replies
        and "name: engine.keep_replies keeps what each client has sent, not only their noised sum; set it to false",
    )


def _not_of_clients(settings: ClientPrivacy, recipe: Planned, method: Method, name: str) -> str:
    """Why the sum that is noised is not all that clients give away, or not the bounded sum that the noise is measured by."""
    return _first(
        (method.pooled or method.personal is everything)
        and f"name: 'client' noises what clients send, and method {name!r} sends no leaves; set it to none",
        (method.absorb is not absorb_updates or method.sent is not as_packed)
        and f"name: method {name!r} sends something else than new values of the leaves that it was sent, or merges whole factors, "
        "which the clip does not bound; choose another method",
        (method.open is not open_run or method.grown is not no_leaves)
        and f"name: method {name!r} with these options learns of the clients' choices before the first round; change its options",
        (method.merge not in MEANS)
        and f"name: noise is measured by a mean of clipped changes, and {recipe.federation.merge.rule!r} answers to one client in other "
        "ways; set federation.merge.rule to mean",
        (recipe.engine.name == "flower" and recipe.evaluation.unseen.clients)
        and "name: evaluation.unseen needs numbers of rows, which sites elsewhere do not tell under 'client'; leave it out",
        (settings.quantile is not None and settings.clip is None)
        and "quantile: the clip follows it from a first value on; set clip, or leave it out",
    ) or _first(
        settings.where == "clients" and _not_in_shares(settings, recipe),
        recipe.secure_aggregation.name != "none" and _not_in_sums(settings, recipe),
    )


def _not_in_shares(settings: ClientPrivacy, recipe: Planned) -> str:
    """Why shares of noise would not add up to the noise that is accounted for."""
    return _first(
        settings.least == 0
        and "least: with where: clients say how many replies a round cannot do without, whose shares make the whole noise",
        settings.quantile is not None
        and "quantile: the count that the clip follows is noised by the coordinator; set where to server, or leave it out",
        not isinstance(recipe.compression, NoCompression)
        and "where: coded shares of noise do not add up to the noise of the sum; set compression.name to none, or where to server",
        recipe.federation.sampling == "poisson"
        and "where: the coordinator knows whom it asks, so a sample hides nobody from it; set federation.sampling to fixed",
    )


def _not_in_sums(settings: ClientPrivacy, recipe: Planned) -> str:
    """Why clients cannot be clipped and noised as whole numbers of which a sum alone is seen."""
    return _first(
        settings.clip is None and "clip: secure_aggregation sums numbers that have a bound; set one",
        settings.quantile is not None
        and "quantile: the whole numbers that secure_aggregation sums are measured by one clip for the whole run; leave it out",
        recipe.federation.sampling == "poisson"
        and "name: whether secure_aggregation opens a sum tells how many were drawn, and with that more of each of them than the sampled "
        "Gaussian mechanism accounts for; set federation.sampling to fixed",
    )


def _not_of_rows(recipe: Planned, method: Method, name: str) -> str:
    """Why a row could reach the leaves on another way than by its clipped gradients."""
    return _first(
        (method.passes != 1 or method.finish is not nothing_to_finish or method.finalize is not None)
        and f"name: method {name!r} goes over its rows more than once a round, which is not accounted for; choose another method",
        recipe.training.router_aux > 0
        and "name: the router's load-balancing loss (training.router_aux) is of all rows of a batch together; set it to 0",
        recipe.training.group_by_length
        and "name: each row is drawn by itself, so rows cannot be grouped (training.group_by_length); set it to false",
        ("side" in method.places and recipe.selection.text != "generic")
        and "name: the experts that grafts start from are chosen on the client's rows, and all gradients depend on that; "
        "set selection.text to generic",
    )


def _first(*reasons: str | bool) -> str:
    """The first reason that holds."""
    return next((reason for reason in reasons if isinstance(reason, str) and reason), "")


def discreet(
    settings: NoPrivacy | ClientPrivacy | ExamplePrivacy, questions: Mapping[str, Question], measured: bool
) -> dict[str, Question]:
    """The questions with replies that tell nothing but what the coordinator cannot do without.

    Args:
        settings: of the run.
        questions: all that a client can be asked.
        measured: figures of the evaluation are told whether the recipe wants them or not.
    """
    if isinstance(settings, NoPrivacy):
        return dict(questions)
    measured = measured or settings.figures
    allowed = {name: settings.told if name == "train" else frozenset[str]() for name in questions if not (measured and name in MEASURING)}
    return {name: _telling(question, allowed[name]) if name in allowed else question for name, question in questions.items()}


def _telling(question: Question, allowed: frozenset[str]) -> Question:
    def asked(client: Client, package: Bundle) -> Bundle:
        reply = question(client, package)
        return Bundle(trees=reply.trees, facts={name: fact for name, fact in reply.facts.items() if name in allowed})

    return asked
