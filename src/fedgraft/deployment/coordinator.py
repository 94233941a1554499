"""The coordinator's command: the SuperLink in a process of its own, the sites' keys let in, and what happens told in lines."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import psutil

from fedgraft import files
from fedgraft.deployment import keys
from fedgraft.deployment.federation import SETTINGS, STAND, Federation, find, joined
from fedgraft.deployment.job import VARIABLE
from fedgraft.deployment.processes import Part, Parts, answers, ready, refuse_taken

if TYPE_CHECKING:
    from fedgraft.engine.control import Control

Tell: TypeAlias = Callable[[str], None]
PACE = 2.0  # seconds between looks at sites and runs


@dataclass
class Watch:
    """What was told already."""

    control: Control
    tell: Tell
    admitted: dict[str, bytes] = field(default_factory=dict)
    """Site -> the key it is let in with."""
    states: dict[str, str] = field(default_factory=dict)
    runs: dict[int, str] = field(default_factory=dict)

    def admit(self, sites: dict[str, bytes]) -> None:
        """Let in whose key has come, shut out whose key has gone; a site with a new key is both."""
        kept = {name: key for name, key in self.admitted.items() if sites.get(name) == key}
        nodes = {node.name: node.id for node in self.control.nodes()}
        for name in self.admitted.keys() - kept.keys():
            if name in nodes:
                self.control.unregister(nodes[name])
            self.states.pop(name, None)
            self.tell(f"site {name} is shut out")
        for name in sites.keys() - kept.keys():
            self.control.register(sites[name], name)
            self.tell(f"site {name} is let in; its key is known")
        self.admitted = dict(sites)

    def look(self) -> None:
        """Tell which sites and runs have changed."""
        for node in self.control.nodes():
            name = node.name or f"without a key ({node.id})"
            if node.status != self.states.get(name, "registered"):
                self.tell(f"site {name} is {node.status}")
            self.states[name] = node.status
        for run in reversed(self.control.runs()):
            state = f"{run.outcome}{f': {run.details}' if run.details else ''}" if run.over else run.status
            if state != self.runs.get(run.id) and state != "pending":
                self.tell(f"run {run.id} is {state}")
            self.runs[run.id] = state


def coordinate(federation: Federation, tell: Tell) -> None:
    """Serve until stopped.

    Raises:
        ValueError: another coordinator works in the folder, the port is taken, the certificate has ended, or the SuperLink ended.
    """
    from fedgraft.engine.control import Control

    folder, settings = federation.folder, federation.settings
    stand = folder / STAND
    refuse_outdated(federation)
    remedy = f"stop what uses it, or set another port in {folder / SETTINGS} and in the sites' settings"
    with files.locked(folder), Parts(federation.logs, folder / "flower", {VARIABLE: str(folder)}) as parts:
        refuse_taken(settings.listen, settings.port, remedy)
        link = parts.start("superlink", "fedgraft.deployment.link", words(federation))
        host, _, port = federation.local_address.rpartition(":")
        ready(link, lambda: answers(host.strip("[]"), int(port)), remedy)
        control = Control(federation.local_address, federation.certificate)
        try:
            me = psutil.Process()
            files.write_json(stand, {"process": os.getpid(), "since": me.create_time(), "address": federation.address})
            place = joined(settings.listen, settings.port)
            tell(f"coordinator of {federation.name} listens on {place}; sites reach it as {federation.address}")
            _serve(federation, Watch(control, tell), link)
        finally:
            stand.unlink(missing_ok=True)
            control.close()


def words(federation: Federation) -> list[str]:
    """The switches of `flower-superlink`."""
    folder, settings = federation.folder, federation.settings
    place = ["--host", settings.listen, "--port", str(settings.port), "--disable-runtime-dependency-installation"]
    if settings.insecure:
        return [*place, "--insecure"]
    names = {"--ssl-ca-certfile": "ca.pem", "--ssl-certfile": "server.pem", "--ssl-keyfile": "server.key"}
    keys.refuse_readable(folder / "server.key")
    return [*place, *(word for switch, name in names.items() for word in (switch, str(folder / name))), "--enable-supernode-auth"]


def refuse_outdated(federation: Federation) -> None:
    """Let only a certificate pass that holds today.

    Raises:
        ValueError: it has ended.
    """
    if not federation.settings.insecure and (left := days_left(federation.folder / "server.pem")) < 0:
        raise ValueError(
            f"{federation.folder / 'server.pem'}: ended {-left} days ago; renew it with: fedgraft federation renew {federation.folder}"
        )


def days_left(certificate: Path) -> int:
    """Whole days until a certificate ends."""
    return int((keys.expiry(certificate).timestamp() - time.time()) // 86400)


def _serve(federation: Federation, watch: Watch, link: Part) -> None:
    while link.ended() is None:
        if not federation.settings.insecure:
            watch.admit(find(federation.folder).sites())
        watch.look()
        time.sleep(PACE)
    raise link.fail("Start the coordinator again; a run continues with: fedgraft resume RUN")
