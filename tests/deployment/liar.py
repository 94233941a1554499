"""`python -m tests.deployment.liar SITE.YAML`: a site whose replies are changed on their way to the coordinator."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from fedgraft.bundle import Bundle
from fedgraft.deployment.attendance import attend
from fedgraft.deployment.client import client as honest
from fedgraft.engine.wire import Frame


def truncated(reply: Any) -> None:
    """The last bytes are missing."""
    array = reply.content["body"]["bundle"]
    array.data = array.data[:-100]


def flipped(reply: Any) -> None:
    """One bit of the last leaf is another."""
    array = reply.content["body"]["bundle"]
    array.data = array.data[:-1] + bytes([array.data[-1] ^ 1])


def short(reply: Any) -> None:
    """Sound, and a leaf is missing."""
    frame = Frame.of_records(reply.content)
    bundle = Bundle.decode(frame.content)
    shared = dict(sorted(bundle.tree("shared").items())[1:])
    reply.content = Frame(
        kind=frame.kind, facts=frame.facts, content=Bundle(trees={"shared": shared}, facts=bundle.facts).encode()
    ).records()


LIES: dict[int, Callable[[Any], None]] = {1: truncated, 2: flipped, 3: short}
"""Round -> what becomes of the reply to `train`."""


def client(message: Message, context: Context) -> Message:
    """The ClientApp."""
    reply, asked = honest(message, context), Frame.of_records(message.content)
    if asked.facts.get("question") == "train":
        LIES.get(int(Bundle.decode(asked.content).facts["round"]), lambda reply: None)(reply)
    return reply


if __name__ == "__main__":
    attend(Path(sys.argv[1]), None, lambda line: print(line, flush=True), "tests.deployment.liar:client")
