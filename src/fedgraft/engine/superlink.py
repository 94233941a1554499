"""Flower's SuperLink behind a gate: from other machines only what a site needs is answered.

Without accounts, which the open edition lacks, the SuperLink lets whoever reaches its port start runs with code of their own, register
keys, and read logs. The gate answers such requests from this machine alone; sites reach the Fleet API, where their keys are checked, and
the doors that are not Flower's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from flwr.superlink import extensions
from flwr.superlink.cli.flower_superlink import flower_superlink
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

FOR_SITES = "/v1/fleet/"
MOST_BYTES = 16_384  # of what is said at a door
Door: TypeAlias = Callable[[bytes], tuple[int, str]]
"""What was said, which anybody may have said -> HTTP status and answer; quick."""


class Gate:
    """ASGI middleware: 403 for everything but the Fleet API and the doors, unless it comes from this machine."""

    def __init__(self, app: ASGIApp, doors: Mapping[str, Door] | None = None) -> None:
        """Stand before an application.

        Args:
            app: the application.
            doors: path -> who answers a POST there, from wherever it comes.
        """
        self.app, self.doors = app, doors or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass one request on."""
        path = str(scope.get("path", ""))
        if scope["type"] == "http" and path in self.doors:
            status, text = await self._at_door(self.doors[path], scope, receive)
            await PlainTextResponse(text, status_code=status)(scope, receive, send)
        elif scope["type"] == "lifespan" or path.startswith(FOR_SITES) or is_near(scope.get("client")):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await PlainTextResponse("Only the Fleet API is open to other machines.", status_code=403)(scope, receive, send)

    async def _at_door(self, door: Door, scope: Scope, receive: Receive) -> tuple[int, str]:
        if scope["method"] != "POST":
            return 405, "only POST"
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > MOST_BYTES:
                return 413, "too long"
        return door(body)


def is_near(client: Any) -> bool:
    """Whether a request's (address, port) is of this machine's loopback interface."""
    try:
        address = ipaddress.ip_address(client[0])
    except (TypeError, ValueError, IndexError):
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def main(doors: Mapping[str, Door] | None = None) -> None:
    """`flower-superlink` with the gate before everything else."""
    extensions.get_middleware = lambda: (Middleware(Gate, doors=doors),)
    flower_superlink()
