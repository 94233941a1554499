"""A site at work: the lasting worker, and the way without one, where base and rows are loaded anew for every question."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedgraft import files
from fedgraft.deployment import door
from fedgraft.deployment.guard import Guard
from fedgraft.deployment.site_settings import load_site
from fedgraft.deployment.worker import Worker

WAIT = 60.0
"""Seconds that whoever works in the site's folder is given to end."""


def work(file: Path, tell: Callable[[str], None] = lambda line: None) -> None:
    """Be the worker of the site that `file` describes, until SIGTERM, Ctrl-C or a `stop` frame.

    Args:
        file: the site's settings.
        tell: hears one line per event.

    Raises:
        ValueError: bad settings, or a worker of this site runs already; names file and key, or process.
        OSError: a file or folder of the site cannot be read or written.
    """
    settings, place = load_site(file)
    door.make_private(place.state)
    with door.opened(place.door, loopback=settings.loopback) as opened, files.locked(place.state, WAIT):
        guard = Guard(settings=settings, place=place, tell=tell)
        tell(f"site {settings.name!r} answers at {place.door}; its log is {place.log}")
        Worker(handle=guard.handle, most_bytes=settings.question_bytes, grace=settings.grace, tell=tell).serve(opened)


def answer_once(file: Path, request: bytes, tell: Callable[[str], None] = lambda line: None) -> bytes:
    """Answer one request without a worker, under the same policy and from the same memories.

    Args:
        file: the site's settings.
        request: as `Guard.handle`.
        tell: hears one line per event.

    Raises:
        ValueError: bad settings, or a worker works in the site's folder.
        OSError: a file or folder of the site cannot be read or written.
    """
    settings, place = load_site(file)
    door.make_private(place.state)
    with files.locked(place.state, WAIT):
        return Guard(settings=settings, place=place, tell=tell).handle(request)
