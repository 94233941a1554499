"""A site's command: worker, SuperNode and executor together, each started again when it ends, all stopped with the command."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fedgraft import files
from fedgraft.deployment import departure, door, forward, keys
from fedgraft.deployment.client import SOCKET
from fedgraft.deployment.connection import Connection, load_connection
from fedgraft.deployment.federation import CONNECTION
from fedgraft.deployment.job import CLIENT
from fedgraft.deployment.processes import LOCAL, Part, Parts, answers, free_port, ready
from fedgraft.deployment.site_settings import load_site

Tell: TypeAlias = Callable[[str], None]
POLL = 0.5  # seconds between looks at the processes
PAUSE, LONGEST_PAUSE = 2.0, 60.0  # seconds before a process is started again, doubled each time
STEADY = 30.0  # seconds after which a start counts as well done
TRIES = 5  # starts in a row that were not
UNKNOWN = "[code: 2004]"
"""What Flower says of a key that nobody registered, and of one whose node counts as connected."""
UNKNOWN_PAUSE, UNKNOWN_PATIENCE = 5.0, 90.0  # a node that was killed counts as connected for a minute, until heartbeats are missed
DISOWNED = "401 Unauthorized"
"""What it says once the connection that it had is none any more."""
SENDING = 5.0  # seconds for the last answer to reach the coordinator


@dataclass(frozen=True)
class Duty:
    """One process of a site."""

    name: str
    module: str
    words: Sequence[str]
    ready: Callable[[], bool] = lambda: True
    """Whether the next one can be started."""


def attend(policy: Path, coordinator: Path | None, tell: Tell, app: str = CLIENT) -> None:
    """Serve until stopped, when the question in hand is given the settings' `grace` to finish, or until the site leaves.

    Args:
        policy: the site's settings.
        coordinator: how the coordinator is reached; None is `coordinator.yaml` beside the settings.
        tell: hears, in lines, what happens.
        app: `module:name` of the installed ClientApp that answers.

    Raises:
        ValueError: settings that are not valid; another command serves the site, or it has left; the coordinator is not the one of
            `ca.pem`, or doesn't know the key; a process that cannot stay up.
    """
    policy = policy.absolute()
    settings, place = load_site(policy)
    connection = load_connection(coordinator or policy.parent / CONNECTION)
    home = departure.home_of(policy)
    departure.refuse_departed(home, connection)
    with files.locked(home), Parts(policy.parent / "logs", home, {SOCKET: str(place.door)}) as parts:
        secret = home / f"executor-{secrets.token_hex(4)}.secret"
        try:
            keys.write_private(secret, secrets.token_bytes(32))
            if not connection.answers():
                tell(f"the coordinator at {connection.address} does not answer yet; waiting for it")
            worker = Duty("worker", "fedgraft.deployment.labour", [str(policy)], lambda: _works(place.door))
            tell(f"site {settings.name}: starting; the coordinator is {connection.address}, the log of what leaves is {place.log}")
            duties = [worker, *_flower(connection, free_port(), secret, app)]
            _Shift(parts, duties, tell, lambda: departure.departed(home, connection)).serve()
            tell(f"site {settings.name} has left the federation; everything is stopped")
        except KeyboardInterrupt:
            _finish(parts, place.door, settings.grace, tell)
            raise
        finally:
            secret.unlink(missing_ok=True)


def _flower(connection: Connection, port: int, secret: Path, app: str) -> list[Duty]:
    place = ["--isolation", "process", "--host", LOCAL, "--port", str(port), "--superexec-auth-secret-file", str(secret)]
    node = Duty("supernode", "fedgraft.engine.supernode", [*connection.words(), *place], lambda: answers(LOCAL, port))
    words = ["--address", f"{LOCAL}:{port}", "--secret-file", str(secret), "--app", app]
    return [node, Duty("executor", "fedgraft.engine.executor", words)]


def _works(place: Path) -> bool:
    """Whether a worker answers at this door."""
    with suppress(door.NoWorkerError, OSError):
        return bool(forward.status(place))
    return False


def _finish(parts: Parts, place: Path, grace: float, tell: Tell) -> None:
    """Let the worker finish what it has in hand, and the answer leave; another Ctrl-C cuts this short."""
    worker = next((part for part in parts.parts if part.name == "worker"), None)
    with suppress(door.NoWorkerError, OSError):
        if worker is not None and forward.status(place)["busy"] is not None:
            tell(f"the question in hand has {grace:g} s to finish; Ctrl-C again stops it at once, which loses nothing but its time")
            forward.stop(place)
            deadline = time.monotonic() + grace
            while worker.ended() is None and time.monotonic() < deadline:
                time.sleep(POLL)
            time.sleep(SENDING)


class _Shift:
    """The processes and how often each was started."""

    def __init__(self, parts: Parts, duties: Sequence[Duty], tell: Tell, over: Callable[[], bool]) -> None:
        self.parts, self.duties, self.tell, self.over = parts, duties, tell, over
        self.running: dict[str, tuple[Part, float]] = {}
        self.failed: dict[str, int] = {}
        self.unknown_since: dict[str, float] = {}

    def serve(self) -> None:
        """Start all, then keep them up until it is over."""
        for duty in self.duties:
            self._start(duty)
        self.tell("ready; stop with Ctrl-C")
        while not self.over():
            time.sleep(POLL)
            for duty in self.duties:
                part, since = self.running[duty.name]
                if part.ended() is not None and not self.over():
                    self._again(duty, part, time.monotonic() - since)

    def _start(self, duty: Duty) -> None:
        part = self.parts.start(duty.name, duty.module, duty.words)
        self.running[duty.name] = (part, time.monotonic())
        ready(part, duty.ready, "Mend what it says, then start the site again.")
        self.tell(f"{duty.name} is started")

    def _again(self, duty: Duty, part: Part, lasted: float) -> None:
        """Tell why a process ended, and start it again unless it never stays."""
        pause, why = self._unknown(duty, part) if UNKNOWN in part.said() else self._ended(duty, part, lasted)
        self.tell(f"{duty.name} is started again in {pause:.0f} s: {why}")
        self.parts.stop(part)
        until = time.monotonic() + pause
        while time.monotonic() < until and not self.over():
            time.sleep(POLL)
        if not self.over():
            self._start(duty)

    def _unknown(self, duty: Duty, part: Part) -> tuple[float, str]:
        """How long to wait, and why, as long as there is hope that the coordinator will take the key."""
        now = time.monotonic()
        if now - self.unknown_since.setdefault(duty.name, now) > UNKNOWN_PATIENCE:
            raise part.fail("The coordinator does not know this site's key (any more): ask there for fedgraft federation add-site.")
        return UNKNOWN_PAUSE, "the coordinator does not know this site's key, or counts it as connected still, up to a minute after a crash"

    def _ended(self, duty: Duty, part: Part, lasted: float) -> tuple[float, str]:
        """The same for any other end, unless there were too many."""
        self.unknown_since.pop(duty.name, None)
        self.failed[duty.name] = 0 if lasted >= STEADY else self.failed.get(duty.name, 0) + 1
        if self.failed[duty.name] >= TRIES:
            raise part.fail(f"{duty.name} ended {self.failed[duty.name]} times in a row; when the reason is mended, start the site again.")
        why = f"it ended with exit code {part.ended()}; it said last\n{part.last_words()}"
        if DISOWNED in part.said():
            why = "the coordinator was started anew, or has shut this site out"
        return min(LONGEST_PAUSE, PAUSE * 2 ** self.failed[duty.name]), why
