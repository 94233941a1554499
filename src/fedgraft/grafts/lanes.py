"""Several clients' leaves in one forward and backward: the batch holds their rows one client after another, each lane is one client's part.

For training, so every leaf keeps its own gradient; `grafts.rows` stacks leaves, for prediction with rows in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedgraft.grafts.lora import LoraSettings, Pairs, Terms
from fedgraft.grafts.side_expert import Side, SideExperts
from fedgraft.moe.site import Arguments, Site

if TYPE_CHECKING:
    from fedgraft.grafts.graft import Fitted


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

    fitted: Fitted
    """Its leaves at their places."""
    rows: slice
    """Its rows of the batch."""
    length: int
    """Tokens a row in a batch of its own; what the batch has more is padding that belongs to nobody."""
    draws: Draws
    """Where its dropout is drawn."""


@dataclass(frozen=True)
class FittedLanes:
    """What is in use for one batch, as `Fitted` for one client. Router rows and pairs on routed experts have no lanes."""

    low_rank: dict[str, LaneTerms]
    sides: dict[int, list[LaneSides]]
    router: dict[int, Tensor] = field(default_factory=dict)
    experts: dict[int, dict[int, Pairs]] = field(default_factory=dict)

    @classmethod
    def of(cls, lanes: Sequence[Lane], grafts: SideExperts) -> FittedLanes:
        """The lanes' leaves by place; `grafts` computes what one graft adds."""
        assert not any(lane.fitted.router or lane.fitted.experts for lane in lanes)
        heads = sorted({head for lane in lanes for head in lane.fitted.low_rank})
        layers = sorted({layer for lane in lanes for layer in lane.fitted.sides})
        return cls(
            low_rank={head: LaneTerms(head, lanes, [lane.fitted.low_rank.get(head) for lane in lanes]) for head in heads},
            sides={layer: [LaneSides(lanes, [lane.fitted.sides.get(layer, []) for lane in lanes], grafts)] for layer in layers},
        )


@dataclass(frozen=True)
class LaneTerms:
    """What is added to the output of one linear layer, each lane's own terms on its part."""

    head: str
    lanes: Sequence[Lane]
    terms: Sequence[Terms | None]

    def add(self, output: Tensor, inputs: Tensor, settings: LoraSettings, training: bool) -> Tensor:
        """As `Terms.add`."""

        def add(number: int) -> Tensor:
            terms, part = self.terms[number], _own_part(output, self.lanes, number)
            return part if terms is None else terms.add(part, _own_part(inputs, self.lanes, number), settings, training)

        return _over_lanes(self.lanes, self.head, output, add)


@dataclass(frozen=True)
class LaneSides:
    """The grafts of one layer, each lane's own on its part."""

    lanes: Sequence[Lane]
    sides: Sequence[Sequence[Side]]
    grafts: SideExperts

    def added(self, site: Site, call: Arguments) -> Tensor:
        """What is added to the routed output [T, H], as by `SideExperts` for each client alone."""
        x, routing = self.grafts.seen(site, call)

        def add(number: int) -> Tensor:
            part = _own_part(x, self.lanes, number)
            choice = routing and (
                _own_part(routing[0], self.lanes, number).flatten(0, 1),
                _own_part(routing[1], self.lanes, number).flatten(0, 1),
            )
            added = [self.grafts.of_one(side, (part.flatten(0, 1), choice)).view_as(part) for side in self.sides[number]]
            return sum(added[1:], added[0]) if added else torch.zeros_like(part)

        return _over_lanes(self.lanes, f"layers.{site.layer}.side", torch.zeros_like(x), add)


def _over_lanes(lanes: Sequence[Lane], place: str, whole: Tensor, work: Callable[[int], Tensor]) -> Tensor:
    """`whole`, a layer's result for the batch, with every lane's own part replaced by `work(number of the lane)` [rows, tokens, F].

    Padding that belongs to no lane stays as it is in `whole`.
    """
    grid, parts = _rows_of(whole, lanes), []
    for number, lane in enumerate(lanes):
        with lane.draws.at(place, whole.device):
            part = work(number)
        rest = grid[lane.rows, lane.length :]
        parts.append(torch.cat([part, rest], 1) if rest.shape[1] else part)
    return torch.cat(parts).view_as(whole)


def _own_part(tensor: Tensor, lanes: Sequence[Lane], number: int) -> Tensor:
    """A lane's rows and tokens [rows, tokens, F] of a tensor over the batch."""
    lane = lanes[number]
    return _rows_of(tensor, lanes)[lane.rows, : lane.length]


def _rows_of(tensor: Tensor, lanes: Sequence[Lane]) -> Tensor:
    """[..., F] as [rows, tokens, F], whether it came by rows or as one list of tokens.

    Raises:
        ValueError: it is neither.
    """
    count = max(lane.rows.stop for lane in lanes)
    listed = tensor.dim() == 2 and len(tensor) % count == 0
    if not listed and not (tensor.dim() == 3 and len(tensor) == count):
        raise ValueError(f"engine.cohort: a layer of this model sees {list(tensor.shape)} for {count} rows; set it to 1")
    return tensor.reshape(count, -1, tensor.shape[-1])
