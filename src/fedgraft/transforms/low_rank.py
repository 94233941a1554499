"""Low-rank compression: the change of a matrix as the product of two thin ones (PowerSGD; Vogels et al. 2019).

PowerSGD takes one power iteration, to be fast on the gradients of a whole network in every step. Here a client sends once a round, and
leaves are thin (LoRA factors have no more rows or columns than `lora.rank`), so the factors come from a singular value decomposition: of
all matrices of that rank their product is nearest to the change (Eckart and Young 1936), and nothing is drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedgraft.transforms.codings import Coding, Shape


class LowRank(Coding):
    """Each matrix of changes as the product of two of fewer columns and rows, in fp32; leaves that this would not shrink as they are."""

    name: Literal["low_rank"] = "low_rank"
    rank: int = Field(default=2, ge=1)
    """Columns of the left factor, rows of the right one: a leaf of m x n numbers costs 4 rank (m + n) bytes."""
    error_feedback: bool = True
    """What was not sent is added to the client's next change; 8 bytes a number in its memory."""
    parts: ClassVar[Mapping[str, torch.dtype]] = {"": torch.float32, "left": torch.float32, "right": torch.float32}

    @property
    def feedback(self) -> bool:
        """As set."""
        return self.error_feedback

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        """Factors of a matrix that they shrink; the flat leaf in their place otherwise."""
        if len(shape) != 2 or self.rank * sum(shape) >= math.prod(shape):
            return {"": (math.prod(shape),)}
        return {"left": (shape[0], self.rank), "right": (self.rank, shape[1])}

    def code(self, change: Tensor) -> dict[str, Tensor]:
        """The largest singular values, half in each factor; NaN for a change that is not finite, so that the reply is a lost one."""
        shapes = self.shapes(tuple(change.shape))
        if "" in shapes:
            return {"": change.float().flatten()}
        if not change.isfinite().all():
            return {part: torch.full(shape, math.nan) for part, shape in shapes.items()}
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        halves = values[: self.rank].sqrt()
        return {"left": (left[:, : self.rank] * halves).float(), "right": (halves[:, None] * right[: self.rank]).float()}

    def decode(self, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """The product, in float64."""
        return parts["left"].double() @ parts["right"].double() if "left" in parts else parts[""].double().reshape(shape)
