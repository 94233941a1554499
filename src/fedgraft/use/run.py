"""The models of a run folder, as its last commit left them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedgraft.aggregation.server import Server
from fedgraft.bundle import Bundle
from fedgraft.data.partition import ClientData, pooled
from fedgraft.evaluation.unseen import held_out
from fedgraft.grafts.graft import GraftedModel
from fedgraft.methods.method import Prediction, settled, whole
from fedgraft.report.record import Record, read_document
from fedgraft.training.client import Client, MemoryStore
from fedgraft.use.about import about
from fedgraft.use.source import SHARED, named, own_recipe


class RunSource:
    """A run folder. Needs the base, but no client's rows; nothing is written."""

    def __init__(self, folder: Path, overrides: Sequence[str] = ()) -> None:
        """Read what was committed last.

        Args:
            folder: the run folder.
            overrides: `model.<key>=<value>`, to load the base from elsewhere or in another way.

        Raises:
            ValueError: no run folder, a damaged one, or a run that has not begun.
        """
        record = Record.load(folder)
        self.folder, self.where, self.record = folder, str(folder), record
        self.recipe = own_recipe(str(folder / "recipe.yaml"), overrides)
        self.base_digest = str(record.environment.get("base_digest", ""))
        if not self.base_digest or not self._state.is_file():
            raise ValueError(f"{folder}: the run has no finished step yet, so there is nothing to use; wait until it has")
        self._stamp = self._stamped()
        self.state = Bundle.load(self._state)
        done, asked = self.state.facts.get("round"), self.state.facts.get("asked")
        if not isinstance(done, int) or not isinstance(asked, int):
            raise ValueError(f"{self._state}: damaged (it is not the state of a run); restore it from a copy")
        self.round, self._asked = done, asked
        self.method = self.recipe.build_method()
        counts: dict[str, dict[str, int]] = record.environment["clients"]
        rows = {client: sum(categories.values()) for client, categories in counts.items()}
        self._everybody = sorted(rows)
        self._unseen = held_out(self.recipe.evaluation.unseen, rows, self.method, self.recipe.seed)
        self._federated = [client for client in rows if client not in self._unseen]
        empty = {client: ClientData(client, [], [], []) for client in self._federated}
        self._asked_clients = sorted([*(pooled(empty) if self.method.pooled else empty), *self._unseen])
        self._here = self.recipe.engine.name != "flower"
        self.clients = named(self._federated) if self._here else {}
        self.has_shared = bool(self.state.tree("shared")) and whole(self.state.tree("shared"))
        self.first = "base"
        self._digests: dict[str, str] = read_document(folder / "digest.json")["clients"] if record.finished else {}
        rounds = self.recipe.federation.rounds
        unfinished = f"{folder}: the run is not finished (round {done} of {rounds}); its last committed leaves are used"
        self.notes: tuple[str, ...] = () if record.finished else (unfinished,)

    def prediction(self, name: str, model: GraftedModel) -> Prediction:
        """A client's model is what the method answers with, the one that `results.json` calls `personal`."""
        if name == SHARED:
            common: Any = self.state.facts.get("common", [])
            return Prediction(tree=self.state.tree("shared"), experts=[[expert] for expert in common])
        client = self._client(self.clients[name], model)
        method = settled(self.method, model.base, self.recipe.lora, self._asked_clients)
        if method.shared_grafts and not client.experts:
            raise ValueError(f"{self.where}: client {client.name!r} has not chosen its experts yet, so it has no model of its own")
        found = method.answer(method, client, method.pack(method, self._server(), client.name))["personal"]
        if found.shares is not None:
            raise ValueError(
                f"{self.where}: client {client.name!r} blends two adapters by how near each prompt is to its own rows "
                f"(method {self.recipe.method.name!r}), which no live model can; a run with method.share set can be used, {SHARED!r} can"
            )
        return found

    def about(self, name: str) -> dict[str, Any]:
        """From the record: the run, what the client's rows are and how well its models did on the held-out ones."""
        return about(self.record, self.clients.get(name), self.round)

    def why_not(self, name: str) -> str:
        """Where the leaves of that client are, or why there are none."""
        if name in self._unseen:
            return " (an unseen client, evaluation.unseen, which keeps no leaves of its own)"
        if name in self._everybody and not self._here:
            return " (its own leaves have never left its site)"
        if name == SHARED:
            what = "is no model by itself" if self.state.tree("shared") else "is nothing"
            return f" (what method {self.recipe.method.name!r} shares {what})"
        return ""

    def _client(self, name: str, model: GraftedModel) -> Client:
        """The client with the memory that belongs to the state, without rows."""
        recipe, memory = self.recipe, MemoryStore(self.folder / "clients").load(name, self._asked)
        if self._stamped() != self._stamp:
            raise ValueError(f"{self.where}: the run has gone on since it was loaded; load it again")
        if self._digests.get(name, digest := memory.digest()) != digest:
            raise ValueError(f"{self.folder / 'clients' / name}: not what the run ended with; restore the folder from a copy")
        return Client(
            data=ClientData(name, [], [], []),
            model=model,
            seed=recipe.seed,
            data_settings=recipe.data,
            training=recipe.training,
            selection=recipe.selection,
            memory=memory,
        )

    def _server(self) -> Server:
        """The coordinator as it would ask now."""
        recipe = self.recipe
        return Server(
            clients=self._federated,
            seed=recipe.seed,
            federation=recipe.federation,
            lr=recipe.training.lr,
            lr_min=recipe.training.lr_min,
            fresh_shared=dict,
            state=self.state,
            round=self.round,
        )

    @property
    def _state(self) -> Path:
        return self.folder / "state" / "state.safetensors"

    def _stamped(self) -> tuple[int, int, int]:
        """Changes with every commit."""
        found = self._state.stat()
        return found.st_mtime_ns, found.st_size, found.st_ino
