"""Profiles of many clients from one pass over a base that is larger than memory, one decoder layer after another."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import Tensor

from fedgraft.moe.layered import Layered
from fedgraft.moe.reading import reading
from fedgraft.moe.site import Site
from fedgraft.selection.profile import GRAM_BYTES, Meter, Part, Profile, Tokens, check_budget, parts

COPIES = 3
"""Of every batch's hidden states: the embeddings, which models hold on to, and a layer's input and output."""
SHARE = 4
"""Hidden states may fill so small a part (a fourth) of the memory that is free; more go to disk."""


def measure_streamed(
    layered: Layered,
    clients: Mapping[str, Iterable[Tokens]],
    tokens: int,
    gram: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    scratch: Path | None = None,
) -> dict[str, Profile]:
    """`profile.measure` for every client; each weight is read once for all of them, and the sums are the same bit for bit.

    Args:
        layered: the base.
        clients: by name, what their own text gives; all batches are held at once.
        tokens: the budget of each in real tokens.
        gram: as in `measure`.
        progress: called with (decoder layers done, all of them).
        scratch: folder for hidden states that would fill too much memory (on a CPU); None is the system's for temporary files.

    Raises:
        ValueError: as `measure`, naming the client, or a model whose layers cannot be run one at a time.
    """
    base = layered.base
    check_budget(base.sites, tokens, gram)
    _check_grams(base.sites, tokens if gram else 0, len(clients))
    meters = {name: Meter(base, tokens, gram) for name in clients}
    queue = [(name, part) for name, batches in clients.items() for part in parts(batches, tokens, base.device) if part.tokens]
    for name, part in queue:
        meters[name].take(part)
    now: list[Meter] = []
    fired: dict[str, int] = {}

    def at(position: int) -> None:
        name, part = queue[position]
        meters[name].take(part)
        now[:] = [meters[name]]

    def see(site: Site, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        fired[site.path] = fired.get(site.path, 0) + 1
        return now[0].see(site, x, index, weight)

    with _scratch(layered, [part for _, part in queue], scratch) as spill, reading(base, see):
        layered.in_step([(part.ids, part.mask) for _, part in queue], at, progress, spill)
    for path in (site.path for site in base.sites if queue and fired.get(site.path) != len(queue)):
        raise ValueError(f"{path}: ran {fired.get(path, 0)} times in {len(queue)} forwards, so what it does can't be measured")
    return {name: _profile(name, meter) for name, meter in meters.items()}


def _profile(name: str, meter: Meter) -> Profile:
    try:
        return meter.profile()
    except ValueError as error:
        raise ValueError(f"client {name!r}: {error}") from error


def _check_grams(sites: list[Site], tokens: int, clients: int) -> None:
    needed = tokens * clients * sum(4 * site.num_experts**2 for site in sites)
    if needed > GRAM_BYTES:
        raise ValueError(
            f"choosing several experts jointly would keep {needed / 2**30:.1f} GiB for {clients} clients at once (at most "
            f"{GRAM_BYTES / 2**30:.0f}); set selection.tokens to {tokens * GRAM_BYTES // needed:,} or less, or graft one expert per layer"
        )


@contextmanager
def _scratch(layered: Layered, queue: list[Part], folder: Path | None) -> Iterator[Path | None]:
    """Where hidden states go: None for memory."""
    config = layered.base.model.config.get_text_config()
    size = COPIES * sum(part.ids.numel() for part in queue) * config.hidden_size * layered.base.model.dtype.itemsize
    if layered.base.device != torch.device("cpu") or size * SHARE <= psutil.virtual_memory().available:
        yield None
        return
    aside = Path(tempfile.mkdtemp(prefix="fedgraft-", dir=folder))
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
