"""What the coordinator asks of its SuperLink: which nodes it knows, which runs there are; to start and to stop one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

Found = TypeVar("Found")
GONE = {"unregistered"}


@dataclass(frozen=True)
class Node:
    """A SuperNode as the SuperLink knows it."""

    id: int
    name: str
    """The site its key was registered for; "" of one that came without."""
    status: str
    """registered (never seen yet), online or offline."""


@dataclass(frozen=True)
class Run:
    """A run as the SuperLink knows it."""

    id: int
    status: str
    """pending, starting, running or finished."""
    outcome: str
    """Of a finished one: completed, failed or stopped."""
    details: str

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status == "finished"


class Control:
    """A connection to the SuperLink's Control API."""

    def __init__(self, address: str, certificate: bytes | None) -> None:
        self.address = address
        self.client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=certificate is None,
            root_certificates=certificate,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def register(self, public_key: bytes, name: str) -> None:
        """Let the node with this key (an OpenSSH line) in."""
        key = load_ssh_public_key(public_key)
        assert isinstance(key, EllipticCurvePublicKey)
        with self._told():
            self.client.RegisterNode(RegisterNodeRequest(public_key=public_key_to_bytes(key), name=name))

    def unregister(self, node: int) -> None:
        """Shut a node out."""
        with self._told():
            self.client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def nodes(self) -> list[Node]:
        """All nodes that are let in."""
        with self._told():
            found = self.client.ListNodes(ListNodesRequest()).nodes_info
        return [Node(id=one.node_id, name=one.name, status=one.status) for one in found if one.status not in GONE]

    def runs(self) -> list[Run]:
        """All runs since the SuperLink was started, the latest first."""
        with self._told():
            found = self.client.ListRuns(ListRunsRequest()).run_dict
        runs = [
            Run(id=one.run_id, status=one.status.status, outcome=one.status.sub_status, details=one.status.details)
            for one in found.values()
        ]
        return sorted(runs, key=lambda run: found[run.id].pending_at, reverse=True)

    def start(self, app: Mapping[str, str], config: Mapping[str, str]) -> int:
        """Start a run of an app, given as its files, with these values of its settings; returns its number."""
        bundle, _ = build_fab_from_files({path: text.encode() for path, text in app.items()})
        with self._told():
            answer = self.client.StartRun(
                StartRunRequest(fab=fab_to_proto(Fab("", bundle, {})), override_config=user_config_to_proto(dict(config)))
            )
        if not answer.HasField("run_id"):
            raise ValueError(f"{self.address}: the SuperLink did not start the run; its log says why")
        return int(answer.run_id)

    def stop(self, run: int) -> None:
        """End a run; one that has ended stays as it is."""
        if any(one.id == run and not one.over for one in self.runs()):
            with self._told():
                self.client.StopRun(StopRunRequest(run_id=run))

    def close(self) -> None:
        """Hang up."""
        self.client.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors in words that say where and what to do."""
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise ValueError(f"{self.address}: the SuperLink refuses ({error.response.status_code}): {error.response.text[:500]}") from None
        except httpx.TransportError as error:
            text = f"{self.address}: no coordinator answers ({error}); start it with: fedgraft coordinator FOLDER"
            raise ValueError(text) from None
