"""The clients that one process holds, by name. Of very many files' clients, rows are in memory only while they are in use."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fedgraft.data.example import SPLITS
from fedgraft.data.partition import ClientData, checked, file_readers, load_clients
from fedgraft.data.settings import DataSettings

RESIDENT = 32
"""Clients with a file each up to which all rows stay in memory; of more, a client's file is read whenever it is its turn."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What is known of a client without its rows."""

    rows: dict[str, int]
    """Of each split."""
    categories: dict[str, int]
    """Training rows of each."""
    digest: str
    """Over all rows."""

    @staticmethod
    def of(client: ClientData) -> Outline:
        """Of rows that are there."""
        return Outline(rows=split_rows(client), categories=training_counts(client), digest=data_digest(client))


class Clients(Mapping[str, ClientData]):
    """Name -> rows, in the order of names."""

    def __init__(self, settings: DataSettings, seed: int) -> None:
        """Read all rows once.

        Raises:
            ValueError: as `load_clients`.
        """
        self._readers = dict(file_readers(settings, seed)) if settings.partition == "files" else {}
        if len(self._readers) <= RESIDENT:
            self._readers = {}
        self._held: dict[str, ClientData] = {}
        found: dict[str, Outline] = {}
        for client in checked((read() for read in self._readers.values()), settings) if self._readers else load_clients(settings, seed):
            found[client.name] = Outline.of(client)
            if not self._readers:
                self._held[client.name] = client
        self.outlines = {name: found[name] for name in sorted(found)}

    def __getitem__(self, name: str) -> ClientData:
        """A client with its rows.

        Raises:
            KeyError: there is none of that name.
            ValueError: its file cannot be read any more, or has changed.
        """
        if name in self._held or name not in self._readers:
            return self._held[name]
        client = self._readers[name]()
        if data_digest(client) != self.outlines[name].digest:
            raise ValueError(f"the data of client {name!r} have changed since the run read them; restore them and resume the run")
        return client

    def __iter__(self) -> Iterator[str]:
        """All names."""
        return iter(self.outlines)

    def __len__(self) -> int:
        """How many."""
        return len(self.outlines)

    def __contains__(self, name: object) -> bool:
        """Without reading anything."""
        return name in self.outlines


def check_rows(clients: Mapping[str, Mapping[str, int]], split: str) -> None:
    """Every client, whose rows of each split are given, has some to be evaluated on.

    Raises:
        ValueError: one has none.
    """
    for name, rows in clients.items():
        if not rows[split]:
            raise ValueError(
                f"client {name!r} has no {split} rows to be evaluated on; raise data.{split}_rows or choose another evaluation.split"
            )


def training_counts(client: ClientData) -> dict[str, int]:
    """Training rows per category."""
    return dict(sorted(Counter(row.category for row in client.train).items()))


def split_rows(client: ClientData) -> dict[str, int]:
    """Rows per split."""
    return {split: len(getattr(client, split)) for split in SPLITS}


def data_digest(client: ClientData) -> str:
    """SHA-256 over all rows of a client."""
    sums = hashlib.sha256()
    for row in (*client.train, *client.validation, *client.test):
        sums.update(f"{row}{row.scoring}\n".encode())
    return sums.hexdigest()
