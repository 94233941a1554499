"""How a client trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedgraft import seeds
from fedgraft.settings import Section


class TrainingSettings(Section):
    """The local optimiser loop; the defaults are the paper's."""

    steps: int = Field(default=5, ge=1)
    """Optimiser steps a round."""
    least_steps: int | None = Field(default=None, ge=1)
    """Unequal local work: each client does between this many and `steps` steps, drawn anew in every round; empty: all do `steps`."""
    batch_size: int = Field(default=4, ge=1)
    """Examples per optimiser step."""
    accumulation: int = Field(default=1, ge=1)
    """Forward passes a step's examples are spread over; lowers memory, changes nothing else."""
    group_by_length: bool = False
    """Rows of nearly equal length meet in a step, which saves padding; a round still has the same rows, its steps come in random order."""
    lr: float = Field(default=4e-5, gt=0)
    """AdamW learning rate of the first round."""
    lr_min: float = Field(default=1e-6, ge=0)
    """Learning rate that the cosine over rounds ends at; constant inside a round."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm over all trained leaves of a client."""
    optimizer_state: Literal["fresh", "kept"] = "fresh"
    """`fresh`: AdamW starts anew every round; `kept`: its moments stay on the client between rounds."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs the forward under autocast; leaves and optimiser stay in fp32."""
    checkpointing: bool = False
    """Gradient checkpointing: less memory, one more forward."""
    router_aux: float = Field(default=0.0, ge=0)
    """Coefficient of the router's load-balancing loss; 0 because the router is frozen, the paper's recipes use the model's own 0.001."""

    def steps_of(self, seed: int, round_number: int, client: str) -> int:
        """Optimiser steps of a client in a round."""
        if self.least_steps is None:
            return self.steps
        return int(seeds.numpy_rng(seed, "steps", round_number, client).integers(self.least_steps, self.steps + 1))

    def for_pool(self, clients: int) -> TrainingSettings:
        """One site that does the steps of so many clients, one after another."""
        return self.model_copy(update={"steps": self.steps * clients, "least_steps": None})

    @model_validator(mode="after")
    def _least_is_below_all(self) -> TrainingSettings:
        if self.least_steps is not None and self.least_steps > self.steps:
            raise ValueError(f"least_steps {self.least_steps} is above steps {self.steps}; lower it, or raise steps")
        return self
