"""A site's end of leaving its federation: tell the coordinator, then stop what serves the site. What the client has learnt stays."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedgraft import files
from fedgraft.deployment import farewell, keys
from fedgraft.deployment.connection import Connection, load_connection
from fedgraft.deployment.federation import CONNECTION
from fedgraft.deployment.site_settings import load_site

LEFT = "left.json"
WAIT = 90.0
"""Seconds that the command which serves the site is given to end."""


@dataclass(frozen=True, kw_only=True)
class Departed:
    """What has become of a site that left."""

    site: str
    before: bool
    """It had left before."""
    memories: Path
    """Where what the client has learnt stays, a folder for each run."""
    runs: list[str]
    size: int
    """Bytes of these folders."""
    log: Path
    """What was asked of the site and what has left it."""


def leave(policy: Path, coordinator: Path | None) -> Departed:
    """Withdraw a site: the coordinator shuts its key out at once, then the site's own processes end.

    Args:
        policy: the site's settings.
        coordinator: how the coordinator is reached; None is `coordinator.yaml` beside the settings.

    Raises:
        ValueError: settings that are not valid; the coordinator does not answer, is another, or does not know the key (then nothing has
            changed, and the command can be repeated); what serves the site does not end.
    """
    policy = policy.absolute()
    settings, place = load_site(policy)
    connection = load_connection(coordinator or policy.parent / CONNECTION)
    if connection.key is None or connection.certificate is None:
        raise ValueError(
            f"site {settings.name} has no key by which it could be known; stop it with Ctrl-C, and have it removed on the coordinator's "
            f"machine with: fedgraft federation remove-site FOLDER {settings.name}"
        )
    answer = _told(connection, settings.name, connection.key.read_bytes(), connection.certificate.read_bytes())
    home = home_of(policy)
    note = {"site": settings.name, "key": _key(connection), "time": datetime.now(UTC).isoformat(timespec="seconds")}
    files.write_json(home / LEFT, note)
    with files.locked(home, WAIT):  # the command that serves the site has seen the note and is gone
        pass
    memories = place.state / "runs"
    runs = sorted(path.name for path in memories.iterdir()) if memories.is_dir() else []
    size = sum(path.stat().st_size for path in memories.rglob("*") if path.is_file())
    return Departed(site=settings.name, before=answer == farewell.REPEATED, memories=memories, runs=runs, size=size, log=place.log)


def home_of(policy: Path) -> Path:
    """The folder of the site's Flower processes, beside its settings; whoever serves the site holds its lock."""
    home = policy.parent / "flower"
    home.mkdir(exist_ok=True)
    return home


def departed(home: Path, connection: Connection) -> bool:
    """Whether the site has left with the key that it has."""
    with suppress(FileNotFoundError):
        return connection.key is not None and files.parse_json((home / LEFT).read_bytes())["key"] == _key(connection)
    return False


def refuse_departed(home: Path, connection: Connection) -> None:
    """Let only a site pass that has not left.

    Raises:
        ValueError: it has.
    """
    if departed(home, connection):
        raise ValueError(
            f"{home / LEFT}: this site has left the federation; to take part again, ask the coordinator for fedgraft federation add-site "
            "and put the new node.key in the place of the old one (if the old key was let in again, delete this file)"
        )


def _told(connection: Connection, site: str, key: bytes, authority: bytes) -> str:
    """The coordinator's answer to the site's statement.

    Raises:
        ValueError: it was not accepted.
    """
    status, challenge = connection.post(farewell.PATH, b"")
    if status == 200:
        status, answer = connection.post(farewell.PATH, farewell.signed(site, authority, challenge, key))
        if status == 200:
            return answer
        raise ValueError(f"{connection.address}: the coordinator refuses: {answer}")
    raise ValueError(
        f"{connection.address}: the coordinator takes no leaves ({status}: {challenge[:200]}); it needs this fedgraft's version"
    )


def _key(connection: Connection) -> str:
    assert connection.key is not None
    return keys.public_half(connection.key.read_bytes())
