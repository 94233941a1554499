"""Stopping at a good moment: signals wait while a write is in hand, and a batch system's SIGTERM stops a run as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


@contextmanager
def deferred() -> Iterator[None]:
    """Ctrl-C and SIGTERM that arrive inside the block, however often, take effect at its end; blocks nest.

    In another thread than the main one, where Python delivers no signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    before: dict[signal.Signals, Any] = {}
    try:
        for number in STOPPING:
            if signal.getsignal(number) is not None:  # None: set by foreign code, which cannot be put back
                before[number] = signal.signal(number, lambda got, frame: arrived.append((got, frame)))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if arrived:
        _deliver(*arrived[-1], before)


@contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside the block."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is None:
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _deliver(number: int, frame: FrameType | None, handlers: dict[signal.Signals, Any]) -> None:
    """What the signal would have done without the delay."""
    handler = handlers[signal.Signals(number)]
    if callable(handler):
        handler(number, frame)
    elif handler == signal.SIG_DFL:
        signal.raise_signal(number)
