"""The HTTP server around the application."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from fedgraft.deployment.federation import is_loopback
from fedgraft.serve.app import make_app
from fedgraft.serve.keys import Ring
from fedgraft.serve.service import Service

AFTER_GRACE = 5.0
"""Seconds for the last bytes once everything was given up."""


class Server(uvicorn.Server):
    """Stops gracefully: nothing new is taken, what waits is refused, answers in the making have the time of grace."""

    def __init__(self, service: Service, ring: Ring | None, tls: tuple[Path, Path] | None = None) -> None:
        """`tls`: key and certificate, PEM.

        Raises:
            OSError: one of them can't be read.
        """
        self.service = service
        super().__init__(
            uvicorn.Config(
                make_app(service, ring),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=int(service.limits.grace + AFTER_GRACE),
                ssl_keyfile=tls and str(tls[0]),
                ssl_certfile=tls and str(tls[1]),
            )
        )

    def run_on(self, opened: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until a signal or `should_exit`; `ready` is called before the first request."""
        self.service.scheduler.start()
        try:
            ready()
            self.run(sockets=[opened])
        finally:
            self.service.scheduler.abort()
            self.service.scheduler.join(AFTER_GRACE)
            opened.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn's, with the scheduler told first."""
        self.service.scheduler.close()
        end = asyncio.get_running_loop().call_later(self.service.limits.grace, self.service.scheduler.abort)
        await super().shutdown(sockets)
        end.cancel()


def opened(host: str, port: int, keys: bool) -> socket.socket:
    """A listening socket.

    Raises:
        ValueError: another address than loopback without keys, or one that can't be listened at.
    """
    if not keys and not is_loopback(host):
        raise ValueError(
            f"--host {host}: whoever reaches it could ask every client's model; make keys with --make-keys keys.json and serve with "
            "--keys keys.json, or listen at 127.0.0.1"
        )
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from None
