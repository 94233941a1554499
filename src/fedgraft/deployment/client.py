"""A site's end of a run, inside its executor: every request goes to the site's worker and the answer back."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from fedgraft.deployment import forward
from fedgraft.deployment.door import NoWorkerError
from fedgraft.engine.flower import client_app

SOCKET, SITE = "FEDGRAFT_SOCKET", "FEDGRAFT_SITE"
"""Environment variables: folder of the worker's socket; or the site's settings, where the site is to answer without a worker if need be."""
PATIENCE, PAUSE = 60.0, 0.5  # seconds that a worker is given that is being started again


def handle(request: bytes, partition: int | None = None) -> bytes:
    """The site's response."""
    if SOCKET in os.environ:
        place = Path(os.environ[SOCKET])
        _await_worker(place)
        return forward.to_site(socket=place)(request, partition)
    if SITE in os.environ:
        return forward.to_site(settings=Path(os.environ[SITE]))(request, partition)
    return forward.refused(f"neither {SOCKET} nor {SITE} is set; start the site with: fedgraft site --policy site.yaml")


def _await_worker(place: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with suppress(NoWorkerError):
            forward.status(place)
            return
        time.sleep(PAUSE)


client = client_app(handle)
