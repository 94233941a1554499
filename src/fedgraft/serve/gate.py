"""What stands before every route: host, key, size. Nothing of a body is read before the key has been seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedgraft.deployment.federation import is_loopback
from fedgraft.serve.keys import Ring
from fedgraft.serve.refusal import Refusal

LOCKED = "/v1/"
METRICS = "/metrics"


@dataclass(frozen=True)
class Gate:
    """The outermost layer of the application."""

    app: ASGIApp
    ring: Ring | None
    """None: no keys, which is for loopback alone."""
    models: frozenset[str]
    body_bytes: int
    count: Callable[[int], None]
    """Hears of the status of every request that is refused here."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, with `allowed` (its models) in its state, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            scope.setdefault("state", {})["allowed"] = self._allowed(scope["path"], headers)
            size = headers.get("content-length", "0")
            if not size.isdecimal() or int(size) > self.body_bytes:
                raise Refusal(413, self._too_large, "too_large")
            await self.app(scope, self._counted(receive), send)
        except Refusal as refusal:
            self.count(refusal.status)
            await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, send)

    def _allowed(self, path: str, headers: Headers) -> frozenset[str]:
        if self.ring is None:
            if not is_loopback(_host(headers.get("host", ""))):  # a page whose name was pointed at this machine
                raise Refusal(403, "Without keys the server answers to the names of this machine alone: use http://127.0.0.1.", "host")
            return self.models
        if not (path.startswith(LOCKED) or path == METRICS):
            return frozenset()
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Refusal(401, "No API key: send it as 'Authorization: Bearer KEY'.", "invalid_api_key")
        models = self.ring.models(key.strip())
        if models is None:
            raise Refusal(401, "This API key is not known here.", "invalid_api_key")
        if path == METRICS and not self.ring.operates(key.strip()):
            raise Refusal(403, "The metrics are for the operator's key.", "not_allowed")
        return models

    def _counted(self, receive: Receive) -> Receive:
        seen = 0

        async def read() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.body_bytes:  # a body that came without its length
                raise HTTPException(413, self._too_large)
            return message

        return read

    @property
    def _too_large(self) -> str:
        return f"The request is larger than {self.body_bytes} bytes."


def _host(header: str) -> str:
    """The host in a Host header, without port and brackets."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]
