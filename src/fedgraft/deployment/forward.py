"""What Flower's client process does: hand the request to the site's worker and bring back its answer. It loads neither torch nor a row.

Only where no worker listens, and the settings of the site can be read here, does it answer by itself, which is slow.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from fedgraft.deployment import door, frames
from fedgraft.deployment.place import place_of
from fedgraft.engine.wire import Frame

LOG = logging.getLogger("fedgraft")
MOST_BYTES = 1 << 40
"""Longest answer; the worker is of the same user, so this only guards against nonsense."""
Handle: TypeAlias = Callable[[bytes, int | None], bytes]
"""(request, partition, which means nothing at a site) -> response."""


def to_site(*, settings: Path | None = None, socket: Path | None = None) -> Handle:
    """The client's half of a deployment.

    Args:
        settings: the site's `site.yaml`; needed to answer without a worker.
        socket: folder of the worker's socket; None: where the settings say.

    Raises:
        ValueError: neither is given, or the settings are no YAML mapping.
        OSError: the settings cannot be read.
    """
    if socket is None:
        if settings is None:
            raise ValueError("name the site's settings (site.yaml) or the folder of its worker's socket")
        socket = place_of(settings).door
    place = socket

    def handle(request: bytes, partition: int | None = None) -> bytes:
        try:
            return _of_worker(place, request)
        except door.NoWorkerError as error:
            if settings is None:
                return refused(f"its worker does not run ({error}); start it with: fedgraft site")
            return _by_itself(settings, request, str(error))

    return handle


def status(socket: Path) -> dict[str, object]:
    """What the worker at this door is doing: `pid`, `fedgraft`, `answered`, `waiting`, and for how long it is `busy`.

    Raises:
        NoWorkerError: none listens.
        OSError: it went away.
    """
    header, _ = _exchange(socket, "status", b"")
    return dict(header["status"])


def stop(socket: Path) -> None:
    """Tell the worker at this door to finish what it has in hand and end.

    Raises:
        NoWorkerError: none listens.
        OSError: it went away.
    """
    _exchange(socket, "stop", b"")


def _of_worker(place: Path, request: bytes) -> bytes:
    try:
        header, answer = _exchange(place, "question", request)
    except door.NoWorkerError:
        raise
    except (OSError, ValueError) as error:
        return refused(f"its worker went away in the middle of the question ({error}); asked again, it starts from the memory it had")
    return answer if header.get("verdict") == "answered" else refused(str(header.get("reason")))


def _exchange(place: Path, kind: str, body: bytes) -> tuple[dict[str, object], bytes]:
    connection, token = door.connect(place)
    with connection:
        with suppress(ConnectionError):  # a question that is too long is answered before it has been sent
            frames.send(connection, {"kind": kind, "token": token}, body)
        header, length = frames.receive_header(connection, wait=None)
        return header, frames.receive_body(connection, length, MOST_BYTES)


def _by_itself(settings: Path, request: bytes, why: str) -> bytes:
    LOG.warning("%s; answering without a worker, which loads base model and rows for every question: start one with: fedgraft site", why)
    from fedgraft.deployment.service import answer_once

    try:
        return answer_once(settings, request, LOG.info)
    except (ValueError, OSError) as error:
        LOG.error("%s", error)
        return refused("the site could not answer; its own log says why")


def refused(reason: str) -> bytes:
    """The response of a site that does not answer."""
    return Frame(kind="refused", facts={"reason": reason}).encode()
