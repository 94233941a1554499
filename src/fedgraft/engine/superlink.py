"""Flower's SuperLink behind a gate: from other machines only what a site needs is answered.

Without accounts, which the open edition lacks, the SuperLink lets whoever reaches its port start runs with code of their own, register
keys, and read logs. The gate answers such requests from this machine alone; sites reach the Fleet API, where their keys are checked.
"""

from __future__ import annotations

import ipaddress
from typing import Any

from flwr.superlink import extensions
from flwr.superlink.cli.flower_superlink import flower_superlink
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

FOR_SITES = "/v1/fleet/"


class Gate:
    """ASGI middleware: 403 for everything but the Fleet API, unless it comes from this machine."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass one request on."""
        if scope["type"] == "lifespan" or str(scope.get("path", "")).startswith(FOR_SITES) or is_near(scope.get("client")):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await PlainTextResponse("Only the Fleet API is open to other machines.", status_code=403)(scope, receive, send)


def is_near(client: Any) -> bool:
    """Whether a request's (address, port) is of this machine's loopback interface."""
    try:
        address = ipaddress.ip_address(client[0])
    except (TypeError, ValueError, IndexError):
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def main() -> None:
    """`flower-superlink` with the gate before everything else."""
    extensions.get_middleware = lambda: (Middleware(Gate),)
    flower_superlink()


if __name__ == "__main__":
    main()
