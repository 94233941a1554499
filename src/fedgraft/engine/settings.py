"""The recipe section `engine`: where clients run, one model per kind."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, field_validator

from fedgraft.settings import Section


class InProcessSettings(Section):
    """All clients in this process, one base model in memory."""

    name: Literal["inprocess"] = "inprocess"
    """`inprocess`: all clients in this process, one base model in memory. `flower-simulation`: clients in several processes of this
    machine, over several GPUs if there are. `flower`: sites elsewhere; start it with `fedgraft run --on`."""
    keep_replies: bool = False
    """Keep every round's replies in `replies/` of the run folder, so that `fedgraft forget` can do the merges again without one client."""
    cohort: int | Literal["auto"] = Field(default=1)
    """Clients that train at once, their batches going through the frozen base together: faster, for more memory. 1: one after another.
    `auto`: as many as fit `cohort_gib`. Results are those of one after another to rounding, and stay the same bits for the same size."""
    cohort_gib: float = Field(default=4.0, gt=0)
    """What a cohort may take beside the base, by the estimate of the account, in GiB; used by `cohort: auto`."""

    @field_validator("cohort")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{value} clients cannot train at once; set it to 1 or more, or to auto")
        return value


class SimulationSettings(Section):
    """Clients in processes of Flower's simulation (Ray); every process holds the base model."""

    name: Literal["flower-simulation"] = "flower-simulation"
    cpus: float = Field(default=1.0, gt=0)
    """Processors of each client; as many clients run at once as fit. Without `model.threads` it is also its number of torch threads."""
    gpus: float = Field(default=0.0, ge=0)
    """Share of a GPU that each client takes: 0.5 puts two on each, which then holds the base model twice."""
    deadline_seconds: float | None = Field(default=None, gt=0)
    """Longest wait for the replies to one question; what comes later is lost, the client keeps what it learnt. Empty: no limit."""
    wait_seconds: float = Field(default=600.0, gt=0)
    """Longest wait for all clients to introduce themselves, for which each process loads the base model."""
    keep_replies: bool = False
    """Keep every round's replies in `replies/` of the run folder, so that `fedgraft forget` can do the merges again without one client."""


class FlowerSettings(Section):
    """Sites elsewhere, through a Flower SuperLink."""

    name: Literal["flower"] = "flower"
    clients: int = Field(default=2, ge=1)
    """How many sites the run waits for before it begins; they are its clients to the end."""
    deadline_seconds: float | None = Field(default=3600.0, gt=0)
    """Longest wait for the replies to one question; what comes later is lost, the client keeps what it learnt. Empty: no limit."""
    wait_seconds: float = Field(default=600.0, gt=0)
    """Longest wait for the sites to introduce themselves, for which each loads the base model."""
    keep_replies: bool = False
    """Keep every round's replies in `replies/` of the run folder, so that `fedgraft forget` can do the merges again without one client."""


def _named(values: Any) -> Any:
    """The kind need not be named where it is the usual one."""
    return {"name": "inprocess", **values} if isinstance(values, dict) else values


EngineSettings: TypeAlias = Annotated[
    InProcessSettings | SimulationSettings | FlowerSettings, Field(discriminator="name"), BeforeValidator(_named)
]
