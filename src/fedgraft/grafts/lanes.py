"""Several clients' leaves in one forward: the batch holds their rows one client after another, and each lane is one client's part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


class Draws:
    """One client's random stream, as `seeds.torch_default` would give it alone; dropout draws from it wherever a lane is worked on.

    Use it inside `torch.random.fork_rng`, since the default generators are left as it set them last.
    """

    def __init__(self, seed: int, repeats: bool) -> None:
        """Begin the stream.

        Args:
            seed: its seed.
            repeats: places are drawn for a second time in `backward` (gradient checkpointing), and alike then.
        """
        self._seed, self._repeats = seed, repeats
        self._states: dict[torch.device, Tensor] = {}
        self._starts: dict[str, Tensor] = {}

    def begin(self) -> None:
        """A forward starts: every place draws anew."""
        self._starts = {}

    @contextmanager
    def at(self, place: str, device: torch.device) -> Iterator[None]:
        """What is drawn inside the block, on one device, comes from this stream; `place` comes once in a forward."""
        if device not in self._states:
            self._states[device] = torch.Generator(device).manual_seed(self._seed).get_state()
        generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
        if (start := self._starts.get(place)) is not None:
            generator.set_state(start)
            yield
            return
        if self._repeats:
            self._starts[place] = self._states[device]
        generator.set_state(self._states[device])
        yield
        self._states[device] = generator.get_state()


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One client's part of a batch."""

    tree: Mapping[str, Tensor]
    """Its leaves."""
    experts: list[list[int]]
    """Source experts of its grafts [L][r]."""
    rows: slice
    """Its rows of the batch."""
    length: int
    """Tokens a row in a batch of its own; what the batch has more is padding that belongs to nobody."""
    draws: Draws
    """Where its dropout is drawn."""


def over_lanes(lanes: Sequence[Lane], place: str, whole: Tensor, work: Callable[[int], Tensor]) -> Tensor:
    """`whole`, a layer's result for the batch, with every lane's own part replaced by `work(number of the lane)` [rows, tokens, F].

    Padding that belongs to no lane stays as it is in `whole`.
    """
    grid, parts = rows_of(whole, lanes), []
    for number, lane in enumerate(lanes):
        with lane.draws.at(place, whole.device):
            part = work(number)
        rest = grid[lane.rows, lane.length :]
        parts.append(torch.cat([part, rest], 1) if rest.shape[1] else part)
    return torch.cat(parts).view_as(whole)


def own_part(tensor: Tensor, lanes: Sequence[Lane], number: int) -> Tensor:
    """A lane's rows and tokens [rows, tokens, F] of a tensor over the batch."""
    lane = lanes[number]
    return rows_of(tensor, lanes)[lane.rows, : lane.length]


def rows_of(tensor: Tensor, lanes: Sequence[Lane]) -> Tensor:
    """[..., F] as [rows, tokens, F], whether it came by rows or as one list of tokens.

    Raises:
        ValueError: it is neither.
    """
    count = max(lane.rows.stop for lane in lanes)
    listed = tensor.dim() == 2 and len(tensor) % count == 0
    if not listed and not (tensor.dim() == 3 and len(tensor) == count):
        raise ValueError(f"engine.cohort: a layer of this model sees {list(tensor.shape)} for {count} rows; set it to 1")
    return tensor.reshape(count, -1, tensor.shape[-1])
