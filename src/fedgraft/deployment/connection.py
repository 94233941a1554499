"""How a site reaches its coordinator: `coordinator.yaml`, which comes from there, beside the certificate and the site's key."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from http.client import HTTPException, HTTPSConnection
from pathlib import Path

from pydantic import ValidationError

from fedgraft import files
from fedgraft.deployment import keys
from fedgraft.deployment.federation import is_loopback
from fedgraft.settings import Section
from fedgraft.yaml_text import read_yaml


class ConnectionFile(Section):
    """`coordinator.yaml`; paths are relative to its folder."""

    address: str
    """HOST:PORT of the coordinator."""
    certificate: str = "ca.pem"
    """The federation's certificate, by which the site knows the coordinator."""
    key: str = "node.key"
    """The site's private key, by which the coordinator knows the site."""
    insecure: bool = False
    """No TLS and no key; only on the coordinator's own machine."""


@dataclass(frozen=True, kw_only=True)
class Connection:
    """A checked `coordinator.yaml`."""

    host: str
    port: int
    certificate: Path | None
    """None without TLS; then there is no key either."""
    key: Path | None

    @property
    def address(self) -> str:
        """`host:port`, as Flower takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def words(self) -> list[str]:
        """The switches of `flower-supernode`."""
        if self.certificate is None:
            return ["--superlink", self.address, "--insecure"]
        return ["--superlink", self.address, "--root-certificates", str(self.certificate), "--auth-supernode-private-key", str(self.key)]

    def post(self, path: str, body: bytes) -> tuple[int, str]:
        """HTTP status and text that the coordinator answers to a POST.

        Raises:
            ValueError: something else answers, or nothing.
        """
        assert self.certificate is not None
        if not self.answers():
            raise ValueError(f"{self.address}: the coordinator does not answer, so nothing was changed; repeat this when it is up")
        context = ssl.create_default_context(cafile=str(self.certificate))
        line = HTTPSConnection(self.host, self.port, timeout=30.0, context=context)
        try:
            line.request("POST", path, body)
            answer = line.getresponse()
            return answer.status, answer.read().decode("utf-8", "replace")
        except (OSError, HTTPException) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{self.address}: the coordinator went away in mid-sentence ({why}); repeat this, which does no harm"
            ) from None
        finally:
            line.close()

    def answers(self) -> bool:
        """Whether the coordinator answers there, and is the one of the certificate.

        Raises:
            ValueError: something else answers.
        """
        try:
            with socket.create_connection((self.host, self.port), timeout=10.0) as plain:
                if self.certificate is not None:
                    with ssl.create_default_context(cafile=str(self.certificate)).wrap_socket(plain, server_hostname=self.host):
                        pass
        except ssl.SSLCertVerificationError as error:
            raise ValueError(
                f"{self.address}: what answers there is not this federation's coordinator ({error.verify_message}); "
                f"compare the address and {self.certificate} with the coordinator's"
            ) from None
        except ssl.SSLError as error:
            raise ValueError(f"{self.address}: no TLS there ({error.reason}); ask the coordinator for address and port") from None
        except OSError:
            return False
        return True


def load_connection(file: Path) -> Connection:
    """Read and check `coordinator.yaml`.

    Raises:
        ValueError: no such file, not valid, a key that is missing or that others can read, or no TLS to another machine.
    """
    if not file.is_file():
        raise ValueError(f"{file}: missing; it lies in the folder that the coordinator made for this site, beside ca.pem and node.key")
    try:
        values = ConnectionFile.model_validate(read_yaml(files.read_text(file), str(file)) or {})
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise ValueError(f"{file}: {'; '.join(lines)}") from None
    host, _, port = values.address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{file}: address: {values.address!r} is not HOST:PORT")
    if values.insecure:
        if not is_loopback(host):
            raise ValueError(f"{file}: insecure: without TLS and keys only 127.0.0.1 is allowed, not {host}; remove it")
        return Connection(host=host, port=int(port), certificate=None, key=None)
    certificate, key = ((file.parent / Path(name).expanduser()).absolute() for name in (values.certificate, values.key))
    if not certificate.is_file():
        raise ValueError(f"{certificate}: missing; it is the federation's ca.pem, which the coordinator has")
    keys.refuse_readable(key)
    return Connection(host=host, port=int(port), certificate=certificate, key=key)
