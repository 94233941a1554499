"""Dividing a dataset among clients; every division is a function of the data, the settings and the seed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedgraft import plugins
from fedgraft.data.example import SPLITS, SUFFIXES, Example
from fedgraft.data.settings import DataSettings
from fedgraft.seeds import numpy_rng

SAFE_NAME = re.compile(r"[A-Za-z0-9_-]([A-Za-z0-9._-]*[A-Za-z0-9_-])?")
DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # no file or folder on Windows can be called that
Splits: TypeAlias = dict[str, list[Example]]
Counts: TypeAlias = NDArray[np.int64]


class Load(Protocol):
    """What a dataset module exports as `load`."""

    def __call__(self, split: str, path: str | None = None) -> list[Example]:
        """Rows of one split."""
        ...


@dataclass(frozen=True)
class ClientData:
    """One client's rows, in a shuffled but reproducible order; validation and test are empty only where their limit is 0."""

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]

    def sealed(self) -> ClientData:
        """The same without its test rows, for all that must not depend on them."""
        return replace(self, test=[])


def load_clients(settings: DataSettings, seed: int) -> list[ClientData]:
    """The clients of a run, sorted by name. Names are fit for folders.

    Raises:
        ValueError: too few rows for what is asked, a client without rows, two clients of one name, or a name unfit for a folder.
    """
    clients = PARTITIONS[settings.partition](settings, _loader(settings), seed)
    return sorted(checked(clients, settings), key=lambda client: client.name)


def file_readers(settings: DataSettings, seed: int) -> list[tuple[str, Callable[[], ClientData]]]:
    """(name, what reads its rows) of each client of the partition `files`, nothing of which is read yet.

    Raises:
        ValueError: there are no files.
    """

    def read(name: str, entry: Path) -> ClientData:
        return _of_file(settings, _loader(settings), seed, name, entry)  # a loader holds on to what it has read

    return [(name, partial(read, name, entry)) for name, entry in _client_files(settings)]


def pooled(clients: Mapping[str, ClientData]) -> dict[str, ClientData]:
    """One site with all training rows, under a name that no client has; for an upper bound that no federation can have."""
    name = "pooled"
    while name in {client.lower() for client in clients}:
        name += "_"
    return {name: ClientData(name, [row for client in clients.values() for row in client.train], [], [])}


def by_category(settings: DataSettings, load: Load, seed: int) -> list[ClientData]:
    """One client per category ("pathological" in FLEx)."""
    pools = _pools(settings, load)
    clients = []
    for name in settings.categories or list(pools["train"]):
        splits: Splits = {}
        for split in SPLITS:
            rows, limit = pools[split].get(name, []), _limit(settings, split)
            if limit is not None and limit > len(rows):
                raise ValueError(
                    f"category {name!r} has {len(rows)} {split} rows, data.{split}_rows asks for {limit}; lower it or drop the category"
                )
            splits[split] = _pick(rows, limit, seed, name, split)
        clients.append(ClientData(name, **splits))
    return clients


def by_dirichlet(settings: DataSettings, load: Load, seed: int) -> list[ClientData]:
    """Every client draws its mixture of categories from a symmetric Dirichlet distribution (Hsu et al. 2019, and FLEx).

    Disjoint clients: clients draw in order; what an exhausted category lacks is refilled from the others in proportion to their remaining
    rows, and validation and test follow the mixture that the training rows ended up with. With `overlap` every client draws its training
    rows with replacement from the whole set, and its validation and test rows without.
    """
    pools = _pools(settings, load)
    kinds = list(pools["train"])
    sizes = {split: _sizes(settings, split, sum(map(len, pools[split].values()))) for split in SPLITS}
    order = {split: [_pick(pools[split].get(kind, []), None, seed, kind, split) for kind in kinds] for split in SPLITS}
    used = {split: np.zeros(len(kinds), np.int64) for split in SPLITS}
    clients = []
    for index, name in enumerate(_names(settings.clients)):
        mixture = numpy_rng(seed, "partition", "mixture", name).dirichlet([settings.alpha] * len(kinds))
        splits: Splits = {}
        for split in SPLITS:
            if settings.overlap and split == "train":
                share = _whole(sizes[split][index], mixture)
                splits[split] = _draw(order[split], share, seed, name)
            else:
                start = np.zeros_like(used[split]) if settings.overlap else used[split]
                share = allocate(sizes[split][index], mixture, np.array([len(rows) for rows in order[split]]) - start)
                rows = [row for kind, first, number in zip(order[split], start, share, strict=True) for row in kind[first : first + number]]
                splits[split] = _pick(rows, None, seed, name, split)
                used[split] = start + share
            if split == "train" and share.any():
                mixture = share / share.sum()
        clients.append(ClientData(name, **splits))
    return clients


def evenly(settings: DataSettings, load: Load, seed: int) -> list[ClientData]:
    """Equal shares of the shuffled rows."""
    pools = _pools(settings, load)
    shares: dict[str, list[list[Example]]] = {}
    for split in SPLITS:
        rows = _pick([row for kind in pools[split].values() for row in kind], None, seed, "all", split)
        ends = np.cumsum(_sizes(settings, split, len(rows)))
        shares[split] = [rows[end - size : end] for end, size in zip(ends, _sizes(settings, split, len(rows)), strict=True)]
    return [ClientData(name, **{split: shares[split][index] for split in SPLITS}) for index, name in enumerate(_names(settings.clients))]


def by_file(settings: DataSettings, load: Load, seed: int) -> list[ClientData]:
    """One client per file of the folder `path`, or per subfolder with files such as train.jsonl, validation.jsonl and test.jsonl.

    With `settings.name` all of it is one client.
    """
    return [_of_file(settings, load, seed, name, entry) for name, entry in _client_files(settings)]


PARTITIONS: dict[str, Callable[[DataSettings, Load, int], list[ClientData]]] = {
    "category": by_category,
    "dirichlet": by_dirichlet,
    "iid": evenly,
    "files": by_file,
}


def allocate(size: int, mixture: NDArray[np.float64], available: Counts) -> Counts:
    """How many of `size` rows come from each category: the mixture, capped by what is available; the rest in proportion to what remains.

    `mixture` [K] sums to 1; `available` [K] sums to at least `size`.
    """
    assert available.sum() >= size, "the caller checks that there are enough rows"
    share = np.minimum(_whole(size, mixture), available)
    while (short := size - int(share.sum())) > 0:
        left = available - share
        share += np.minimum(_whole(short, left / left.sum()), left)
    return share


def _loader(settings: DataSettings) -> Load:
    """The dataset's `load`; where it has `splits`, a file is read once for all of them, and its rows are held as long as the loader is."""
    dataset = plugins.load("dataset", settings.dataset)
    load: Load = dataset.load
    if not hasattr(dataset, "splits"):
        return load
    read = cache(dataset.splits)
    return lambda split, path=None: read(path)[split]


def _of_file(settings: DataSettings, load: Load, seed: int, name: str, entry: Path) -> ClientData:
    rows = {split: [row for row in load(split, str(entry)) if row.category in (settings.categories or [row.category])] for split in SPLITS}
    return ClientData(name, **{split: _pick(rows[split], _limit(settings, split), seed, name, split) for split in SPLITS})


def _whole(size: int, mixture: NDArray[np.float64]) -> Counts:
    """`size` divided in whole numbers by the largest remainders; the result sums to `size`."""
    exact = size * mixture
    share = np.floor(exact).astype(np.int64)
    share[np.argsort(share - exact, kind="stable")[: size - int(share.sum())]] += 1
    return share


def _draw(order: list[list[Example]], share: Counts, seed: int, name: str) -> list[Example]:
    """Rows drawn with replacement, `share` [K] of each category, shuffled."""
    rng = numpy_rng(seed, "partition", "draw", name)
    rows = [kind[index] for kind, number in zip(order, share, strict=True) for index in rng.integers(0, max(len(kind), 1), number)]
    return [rows[index] for index in rng.permutation(len(rows))]


def _pools(settings: DataSettings, load: Load) -> dict[str, Splits]:
    """Split -> category -> rows, the categories sorted; only those of `settings.categories`, which must exist."""
    pools: dict[str, Splits] = {}
    for split in SPLITS:
        pools[split] = {}
        for row in sorted(load(split, settings.path), key=lambda row: row.category):
            pools[split].setdefault(row.category, []).append(row)
    known = sorted({kind for pool in pools.values() for kind in pool})
    if len(set(settings.categories or ())) < len(settings.categories or ()):
        raise ValueError(f"data.categories names a category twice: {', '.join(settings.categories or ())}")
    for kind in settings.categories or ():
        if kind not in known:
            raise ValueError(f"data.categories: no category {kind!r}{plugins.nearest(kind, known)}; there are: {', '.join(known)}")
    wanted = set(settings.categories or known)
    if not wanted & pools["train"].keys():
        raise ValueError(f"dataset {settings.dataset!r} has no train rows; give some rows the field split: train, or none a split")
    return {split: {kind: rows for kind, rows in pool.items() if kind in wanted} for split, pool in pools.items()}


def _sizes(settings: DataSettings, split: str, total: int) -> list[int]:
    """Rows of each client: the limit, or else equal shares of all rows."""
    limit = _limit(settings, split)
    shares = [total // settings.clients + (index < total % settings.clients) for index in range(settings.clients)]
    sizes = shares if limit is None else [limit] * settings.clients
    needed = max(sizes, default=0) if settings.overlap and settings.partition == "dirichlet" else sum(sizes)
    if needed > total:
        raise ValueError(
            f"data.{split}_rows: {limit} asks {settings.clients} clients for {needed} {split} rows, there are {total}; "
            "lower it or data.clients, or give a larger set as data.path"
        )
    return sizes


def _pick(rows: list[Example], limit: int | None, seed: int, *stream: str) -> list[Example]:
    """The first `limit` of the shuffled rows, so that a smaller limit takes a part of the same ones."""
    return [rows[index] for index in numpy_rng(seed, "partition", *stream).permutation(len(rows))[:limit]]


def _limit(settings: DataSettings, split: str) -> int | None:
    return {"train": settings.train_rows, "validation": settings.validation_rows, "test": settings.test_rows}[split]


def _names(number: int) -> list[str]:
    width = max(2, len(str(number - 1)))
    return [f"client-{index:0{width}}" for index in range(number)]


def _client_files(settings: DataSettings) -> list[tuple[str, Path]]:
    path = settings.path
    if settings.name is not None and path is not None:
        return [(settings.name, Path(path))]
    if path is None or not Path(path).is_dir():
        raise ValueError(f"data.partition 'files' needs data.path to be a folder with one file or subfolder per client, got {path!r}")
    visible = [entry for entry in sorted(Path(path).iterdir()) if not entry.name.startswith(".")]
    found = [entry for entry in visible if entry.is_dir() or entry.name.endswith(SUFFIXES)]
    if not found:
        raise ValueError(f"{path}: the folder holds no {' or '.join(SUFFIXES)} file and no subfolder")
    splits = [entry for entry in found if entry.is_file() and entry.name.split(".")[0] in SPLITS]
    if splits:
        raise ValueError(
            f"{splits[0]}: named after a split, not a client; put it at {path}/<client>/{splits[0].name} or use another data.partition"
        )
    return [(entry.name.removesuffix(".gz").removesuffix(".jsonl"), entry) for entry in found]


def checked(clients: Iterable[ClientData], settings: DataSettings) -> Iterator[ClientData]:
    """The same clients, one at a time.

    Raises:
        ValueError: one has no rows, a name that another has, or one unfit for a folder.
    """
    seen: dict[str, str] = {}
    for client in clients:
        if not SAFE_NAME.fullmatch(client.name) or DEVICE.fullmatch(client.name):
            raise ValueError(
                f"client name {client.name!r} cannot name a folder: use letters, digits, '.', '_' and '-', no '.' at either end, "
                "and no name of a device such as con or nul"
            )
        if client.name.lower() in seen:
            raise ValueError(
                f"two clients are called {client.name!r} (upper and lower case count as equal); rename one of their files or categories"
            )
        seen[client.name.lower()] = client.name
        for split in SPLITS:
            if not getattr(client, split) and _limit(settings, split) != 0:
                remedy = "add rows" if split == "train" else f"add rows, give some the field split: {split}, or set data.{split}_rows: 0"
                raise ValueError(f"client {client.name!r} has no {split} rows; {remedy}")
        yield client
