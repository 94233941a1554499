"""A site's command: worker, SuperNode and executor together, each started again when it ends, all stopped with the command."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fedgraft import files
from fedgraft.deployment import keys
from fedgraft.deployment.connection import Connection, load_connection
from fedgraft.deployment.federation import CONNECTION
from fedgraft.deployment.job import CLIENT
from fedgraft.deployment.processes import LOCAL, Part, Parts, free_port, listens

Tell: TypeAlias = Callable[[str], None]
POLL = 0.5  # seconds between looks at the processes
PAUSE, LONGEST_PAUSE = 2.0, 60.0  # seconds before a process is started again, doubled each time
STEADY = 30.0  # seconds after which a start counts as well done
TRIES = 5  # starts in a row that were not
UNKNOWN, UNKNOWN_TRIES = (
    "[code: 2004]",
    3,
)  # what Flower says of a key nobody registered; a coordinator that starts lets keys in a moment later


@dataclass(frozen=True)
class Duty:
    """One process of a site."""

    name: str
    module: str
    words: Sequence[str]
    listens: int = 0
    """A port of this machine it is to listen on before the next one is started; 0 is none."""


def attend(policy: Path, coordinator: Path | None, tell: Tell, app: str = CLIENT) -> None:
    """Serve until stopped.

    Args:
        policy: the site's settings.
        coordinator: how the coordinator is reached; None is `coordinator.yaml` beside the settings.
        tell: hears, in lines, what happens.
        app: `module:name` of the installed ClientApp that answers.

    Raises:
        ValueError: settings that are not valid; another command serves the site; the coordinator is not the one of `ca.pem`, or doesn't
            know the key; a process that cannot stay up.
    """
    folder = policy.absolute().parent
    connection = load_connection(coordinator or folder / CONNECTION)
    with files.locked(folder), Parts(folder / "logs", folder / "flower") as parts:
        secret = folder / "flower" / f"executor-{secrets.token_hex(4)}.secret"
        try:
            keys.write_private(secret, secrets.token_bytes(32))
            if not connection.answers():
                tell(f"the coordinator at {connection.address} does not answer yet; waiting for it")
            _Shift(parts, _flower(connection, free_port(), secret, app), tell).serve()
        finally:
            secret.unlink(missing_ok=True)


def _flower(connection: Connection, port: int, secret: Path, app: str) -> list[Duty]:
    place = ["--isolation", "process", "--host", LOCAL, "--port", str(port), "--superexec-auth-secret-file", str(secret)]
    node = Duty("supernode", "fedgraft.engine.supernode", [*connection.words(), *place], listens=port)
    words = ["--address", f"{LOCAL}:{port}", "--secret-file", str(secret), "--app", app]
    return [node, Duty("executor", "fedgraft.engine.executor", words)]


class _Shift:
    """The processes and how often each was started."""

    def __init__(self, parts: Parts, duties: Sequence[Duty], tell: Tell) -> None:
        self.parts, self.duties, self.tell = parts, duties, tell
        self.running: dict[str, tuple[Part, float]] = {}
        self.failed: dict[str, int] = {}

    def serve(self) -> None:
        """Start all, then keep them up."""
        for duty in self.duties:
            self._start(duty)
        self.tell("ready; stop with Ctrl-C")
        while True:
            time.sleep(POLL)
            for duty in self.duties:
                part, since = self.running[duty.name]
                if part.ended() is not None:
                    self._again(duty, part, time.monotonic() - since)

    def _start(self, duty: Duty) -> None:
        part = self.parts.start(duty.name, duty.module, duty.words)
        self.running[duty.name] = (part, time.monotonic())
        if duty.listens:
            listens(part, LOCAL, duty.listens, "Start the site again.")
        self.tell(f"{duty.name} is started")

    def _again(self, duty: Duty, part: Part, lasted: float) -> None:
        """Tell why a process ended, and start it again unless it never stays."""
        unknown = UNKNOWN in part.said()
        self.failed[duty.name] = 0 if lasted >= STEADY else self.failed.get(duty.name, 0) + 1
        if self.failed[duty.name] >= (UNKNOWN_TRIES if unknown else TRIES):
            remedy = "The coordinator does not know this site's key (any more): ask there for fedgraft federation add-site."
            often = f"{duty.name} ended {self.failed[duty.name]} times in a row; when the reason is mended, start the site again."
            raise part.fail(remedy if unknown else often)
        pause = min(LONGEST_PAUSE, PAUSE * 2 ** self.failed[duty.name])
        why = "the coordinator does not know this site's key" if unknown else f"exit code {part.ended()}; it said last\n{part.last_words()}"
        self.tell(f"{duty.name} is started again in {pause:.0f} s, since it ended: {why}")
        self.parts.stop(part)
        time.sleep(pause)
        self._start(duty)
