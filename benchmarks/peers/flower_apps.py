"""Flower's ServerApp and ClientApp; a module of its own, so that an actor imports it and keeps its base model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from common import local_steps, put, taken, work
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from marks import Marks

client, server = ClientApp(), ServerApp()
marks = cache(Marks)


@client.train()
def train(message: Message, context: Context) -> Message:
    """A client's part of a round."""
    name = work().clients[int(context.node_config["partition-id"])]
    put(message.content["arrays"].to_torch_state_dict())
    local_steps(name, int(message.content["config"]["server-round"]) - 1, marks())
    metrics = MetricRecord({"num-examples": work().weights[name]})
    return Message(RecordDict({"arrays": ArrayRecord(taken()), "metrics": metrics}), reply_to=message)


class Marked(FedAvg):
    """Notes when a round is merged, and the bytes of the arrays that travelled in it."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        """Flower's own."""
        heard = list(replies)
        if failed := [message.error.reason for message in heard if message.has_error()]:
            raise RuntimeError(f"Flower lost clients: {failed}")
        size = 2 * sum(len(array.data) for message in heard for array in message.content["arrays"].values())
        merged = super().aggregate_train(server_round, heard)
        marks().round_done(bytes=size)
        return merged


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """All rounds."""
    clients = len(work().clients)
    strategy = Marked(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    strategy.start(grid=grid, initial_arrays=ArrayRecord(work().leaves()), num_rounds=work().rounds)
