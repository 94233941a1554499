"""Ways to write the change of a leaf in fewer bytes, number by number; `low_rank` has the one that takes a leaf as a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from fedgraft.settings import Section

Shape: TypeAlias = tuple[int, ...]


class Coding(Section):
    """A way to write a change: leaf -> parts by name (`""` stands for the address itself) and back."""

    parts: ClassVar[Mapping[str, torch.dtype]]
    """All parts that a leaf can have."""

    @property
    def feedback(self) -> bool:
        """What was left out is added to the next change."""
        return False

    def code(self, change: Tensor) -> dict[str, Tensor]:
        """The parts of a float64 leaf."""
        raise NotImplementedError

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        """The parts that a leaf of this shape has, and their shapes."""
        return dict.fromkeys(self.parts, (math.prod(shape),))

    def decode(self, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """The change as a float64 leaf, from parts of the right types and shapes.

        Raises:
            ValueError: they make no leaf.
        """
        return parts[""].double().reshape(shape)

    def bytes_of(self, shape: Shape) -> int:
        """Bytes of a leaf on the wire."""
        return sum(math.prod(of) * self.parts[name].itemsize for name, of in self.shapes(shape).items())


class Bf16(Coding):
    """Each number of a change rounded to bfloat16."""

    name: Literal["bf16"] = "bf16"
    parts: ClassVar[Mapping[str, torch.dtype]] = {"": torch.bfloat16}

    def code(self, change: Tensor) -> dict[str, Tensor]:
        """Rounded once more, from fp32."""
        return {"": change.float().bfloat16().flatten()}


class Fp16(Coding):
    """Each number of a change rounded to half precision; one beyond 65504 makes the reply a lost one."""

    name: Literal["fp16"] = "fp16"
    parts: ClassVar[Mapping[str, torch.dtype]] = {"": torch.float16}

    def code(self, change: Tensor) -> dict[str, Tensor]:
        """Rounded."""
        return {"": change.half().flatten()}


class Int8(Coding):
    """Each number of a change as one of 255 multiples of a scale, the leaf's largest number / 127."""

    name: Literal["int8"] = "int8"
    error_feedback: bool = True
    """What rounding left out is added to the client's next change; 8 bytes a number in its memory."""
    parts: ClassVar[Mapping[str, torch.dtype]] = {"": torch.int8, "scale": torch.float32}

    @property
    def feedback(self) -> bool:
        """As set."""
        return self.error_feedback

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        """One scale."""
        return {"": (math.prod(shape),), "scale": (1,)}

    def code(self, change: Tensor) -> dict[str, Tensor]:
        """Rounded to the nearest multiple; a leaf of zeros has scale 0."""
        scale = (change.abs().max() / 127).float() if change.numel() else torch.zeros(())
        steps = (change / scale.double()).round().clamp(-127, 127) if scale > 0 else torch.zeros_like(change)
        return {"": steps.to(torch.int8).flatten(), "scale": scale.reshape(1)}

    def decode(self, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """Multiples times scale."""
        return (parts[""].double() * parts["scale"].double()).reshape(shape)


class TopK(Coding):
    """The numbers of a leaf that change most, in fp32, and their places (Aji and Heafield 2017)."""

    name: Literal["top_k"] = "top_k"
    share: float = Field(default=0.1, gt=0, le=1)
    """Share of each leaf's numbers that is sent, rounded up; each costs 8 bytes."""
    error_feedback: bool = True
    """What was not sent is added to the client's next change; 8 bytes a number in its memory."""
    parts: ClassVar[Mapping[str, torch.dtype]] = {"": torch.float32, "index": torch.int32}

    @property
    def feedback(self) -> bool:
        """As set."""
        return self.error_feedback

    def shapes(self, shape: Shape) -> dict[str, Shape]:
        """As many numbers as places."""
        return dict.fromkeys(self.parts, (math.ceil(self.share * math.prod(shape)),))

    def code(self, change: Tensor) -> dict[str, Tensor]:
        """Ties go to the first; places ascend, in the leaf's numbers row by row."""
        (sent,), numbers = self.shapes(change.shape)[""], change.flatten()
        index = numbers.abs().argsort(descending=True, stable=True)[:sent].sort().values
        return {"": numbers[index].float(), "index": index.to(torch.int32)}

    def decode(self, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """Zero elsewhere."""
        index, numel = parts["index"].long(), math.prod(shape)
        if index.numel() and (index[0] < 0 or index[-1] >= numel or (index.diff() <= 0).any()):
            raise ValueError(f"its places do not ascend within the {numel} numbers of the leaf")
        return torch.zeros(numel, dtype=torch.float64).scatter(0, index, parts[""].double()).reshape(shape)
