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
    rows: int
    """How many rows of the batch are its own; they come after those of the lanes before it."""
    length: int
    """Tokens a row in a batch of its own; what the batch has more is padding that belongs to nobody."""
    counts: tuple[int, ...]
    """How many of its tokens a layer sees that doesn't see all: those without any padding, and in the last one perhaps only those with a
    part in the loss."""
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
        outputs, seen = _parts(output, self.lanes), _parts(inputs, self.lanes)

        def add(number: int) -> Tensor:
            terms = self.terms[number]
            return outputs[number] if terms is None else terms.add(outputs[number], seen[number], settings, training)

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
        parts = _parts(x, self.lanes)
        choices = [[part.flatten(0, 1) for part in _parts(tensor, self.lanes)] for tensor in routing or ()]

        def add(number: int) -> Tensor:
            part = parts[number]
            choice = (choices[0][number], choices[1][number]) if choices else None
            added = [self.grafts.of_one(side, (part.flatten(0, 1), choice)).view_as(part) for side in self.sides[number]]
            return sum(added[1:], added[0]) if added else torch.zeros_like(part)

        return _over_lanes(self.lanes, f"layers.{site.layer}.side", torch.zeros_like(x), add)


def _over_lanes(lanes: Sequence[Lane], place: str, whole: Tensor, work: Callable[[int], Tensor]) -> Tensor:
    """`whole`, a layer's result for the batch, with every lane's own part replaced by `work(number of the lane)`, like one of `_parts`.

    Padding that belongs to no lane stays as it is in `whole`.
    """
    padded, parts = _counts(whole, lanes) is None, []
    rests = _rests(whole, lanes) if padded else [None] * len(lanes)
    for number, (lane, rest) in enumerate(zip(lanes, rests, strict=True)):
        with lane.draws.at(place, whole.device):
            part = work(number)
        parts.append((part if rest is None else torch.cat([part, rest], 1)).flatten(0, 1))
    return torch.cat(parts).view_as(whole)


def _parts(tensor: Tensor, lanes: Sequence[Lane]) -> list[Tensor]:
    """The lanes' parts of a tensor over the batch: their rows and tokens [rows, tokens, F], or what a layer sees of them [1, tokens, F]."""
    counts = _counts(tensor, lanes)
    if counts is None:
        return [rows[:, : lane.length] if lane.length < rows.shape[1] else rows for rows, lane in _by_rows(tensor, lanes)]
    flat = tensor.reshape(-1, tensor.shape[-1])
    return [part[None] for part in flat.split(counts)]


def _rests(tensor: Tensor, lanes: Sequence[Lane]) -> list[Tensor | None]:
    """What `_parts` leaves out of each lane's rows."""
    return [rows[:, lane.length :] if lane.length < rows.shape[1] else None for rows, lane in _by_rows(tensor, lanes)]


def _counts(tensor: Tensor, lanes: Sequence[Lane]) -> list[int] | None:
    """How many tokens of each lane a layer sees, None where it sees whole rows; a batch without padding is the same both ways.

    Raises:
        ValueError: neither the rows with their padding nor so many tokens of them, by rows or as one list.
    """
    seen = tuple(tensor.shape[:-1])
    for counts in map(list, zip(*(lane.counts for lane in lanes), strict=True)):
        if seen in ((sum(counts),), (1, sum(counts))):
            return counts
    rows, length = sum(lane.rows for lane in lanes), max(lane.length for lane in lanes)
    if seen not in ((rows * length,), (rows, length)):
        raise ValueError(f"engine.cohort: a layer of this model sees {list(tensor.shape)} for {rows} rows of {length} tokens; set it to 1")
    return None


def _by_rows(tensor: Tensor, lanes: Sequence[Lane]) -> Iterator[tuple[Tensor, Lane]]:
    """The lanes' rows [rows, tokens, F] with all padding."""
    counts = [lane.rows for lane in lanes]
    return zip(tensor.reshape(sum(counts), -1, tensor.shape[-1]).split(counts), lanes, strict=True)
