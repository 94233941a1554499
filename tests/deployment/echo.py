"""A Flower app that does next to nothing: sites give back what they are sent, and say who answered."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

server, client = ServerApp(), ClientApp()


@client.query()
def answer(message: Message, context: Context) -> Message:
    said = message.content["said"]["text"]
    return Message(RecordDict({"said": ConfigRecord({"text": f"{said} from {os.getpid()}"})}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    wanted = int(context.run_config["nodes"])
    while len(nodes := list(grid.get_node_ids())) < wanted:
        pass
    lines = []
    for number in range(2):
        messages = [
            Message(RecordDict({"said": ConfigRecord({"text": f"{number}"})}), dst_node_id=node, message_type="query") for node in nodes
        ]
        replies = list(grid.send_and_receive(messages, timeout=120))
        lines += [reply.content["said"]["text"] if reply.has_content() else str(reply.error) for reply in replies]
    Path(str(context.run_config["out"])).write_text("\n".join(lines), encoding="utf-8")
