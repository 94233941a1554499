"""The coordinator's half as Flower starts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp


def server_app(main: Callable[[Grid, Context], None]) -> ServerApp:
    """A ServerApp that is this function."""
    from flwr.serverapp import ServerApp

    app = ServerApp()
    app.main()(main)
    return app
