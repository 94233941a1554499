"""A federation as the coordinator keeps it: one folder with its settings, certificates, the sites' public keys, and the runs."""

from __future__ import annotations

import ipaddress
import json
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from pydantic import Field, ValidationError

from fedgraft import files
from fedgraft.data.partition import SAFE_NAME
from fedgraft.deployment import keys
from fedgraft.deployment.processes import runs
from fedgraft.settings import Section
from fedgraft.yaml_text import read_yaml

SETTINGS, STAND, CONNECTION = "federation.yaml", "coordinator.json", "coordinator.yaml"
NAMED = Path("federations")
"""Where a federation given by name alone is looked for."""
PORT = 9092


class FederationFile(Section):
    """`federation.yaml`."""

    hosts: tuple[str, ...] = Field(min_length=1)
    """Names and addresses by which sites reach the coordinator; the first stands in the sites' settings."""
    port: int = Field(default=PORT, ge=1, le=65535)
    """The one port that sites need."""
    listen: str = "0.0.0.0"
    """Address of this machine to listen on; 0.0.0.0 is all of them, :: all with IPv6."""
    insecure: bool = False
    """No TLS and no keys; only between processes of one machine."""


@dataclass(frozen=True)
class Federation:
    """An existing federation folder."""

    folder: Path
    settings: FederationFile

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.name

    @property
    def address(self) -> str:
        """Where sites reach the coordinator."""
        return joined(self.settings.hosts[0], self.settings.port)

    @property
    def local_address(self) -> str:
        """Where this machine reaches it."""
        listen = ipaddress.ip_address(self.settings.listen)
        near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(listen), str(listen))
        return joined(near, self.settings.port)

    @property
    def certificate(self) -> bytes | None:
        """The authority's certificate; None without TLS."""
        return None if self.settings.insecure else (self.folder / "ca.pem").read_bytes()

    def sites(self) -> dict[str, bytes]:
        """Name -> public key of every site that is let in."""
        return {path.stem: path.read_bytes() for path in sorted((self.folder / "sites").glob("*.pub"))}

    def admits(self, site: str) -> bool:
        """Whether a site of this name is let in; without keys anybody is."""
        return self.settings.insecure or (self.folder / "sites" / f"{site}.pub").is_file()

    def bundle(self, site: str) -> Path:
        """The folder that is to be carried to a site."""
        return self.folder / "bundles" / site

    @property
    def logs(self) -> Path:
        """What the processes said."""
        return self.folder / "logs"


def create(folder: Path, hosts: Sequence[str], *, port: int, listen: str, insecure: bool) -> Federation:
    """Make a federation in a new folder, still without sites.

    Raises:
        ValueError: the folder is not new, a host that is none, or an insecure one that other machines could reach.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder}: exists and is never overwritten; choose another folder, or add sites with: fedgraft federation add-site"
        )
    if insecure:
        listen = "127.0.0.1"
        for host in hosts:
            if not is_loopback(host):
                raise ValueError(f"--insecure with --host {host}: without TLS and keys only 127.0.0.1 is allowed; leave --insecure out")
    federation = Federation(folder, _checked({"hosts": list(hosts), "port": port, "listen": listen, "insecure": insecure}, "federation"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if not insecure:
        keys.make_authority(folder, federation.name)
        keys.issue_certificate(folder, hosts)
    files.write_text(folder / SETTINGS, _text(federation.settings))
    return federation


def find(place: str | Path) -> Federation:
    """The federation in a folder, or of this name under `federations/`.

    Raises:
        ValueError: there is none, or its settings are not valid.
    """
    for folder in (Path(place), NAMED / place):
        if (folder / SETTINGS).is_file():
            path = folder / SETTINGS
            settings = _checked(read_yaml(files.read_text(path), str(path)) or {}, str(path))
            if settings.insecure and not all(map(is_loopback, [*settings.hosts, settings.listen])):
                raise ValueError(f"{path}: insecure: true is only for hosts and listen on 127.0.0.1; remove it, or correct those")
            return Federation(folder.resolve(), settings)
    raise ValueError(f"{place}: no federation there (it has no {SETTINGS}); make one with: fedgraft federation init {place} --host NAME")


def add_site(federation: Federation, site: str, public_key: Path | None = None) -> Path:
    """Let a site in and write the folder to be carried to it.

    Args:
        federation: where.
        site: its name, unique in the federation.
        public_key: of a key that the site made itself; without one the key is made here.

    Raises:
        ValueError: a name that is none or is taken, or a key that is not one.
    """
    if not SAFE_NAME.fullmatch(site):
        raise ValueError(f"--site {site}: a name is letters, digits, '.', '_' and '-', no '.' at either end")
    known, bundle = federation.folder / "sites" / f"{site}.pub", federation.bundle(site)
    if known.exists() or bundle.exists():
        raise ValueError(
            f"{site}: is a site already; for a new key remove it first: fedgraft federation remove-site {federation.folder} {site}"
        )
    public = b"" if federation.settings.insecure else None
    if public is None and public_key is not None:
        public = public_key.read_bytes()
        keys.check_public(public, str(public_key))
        for other, key in federation.sites().items():
            if key.split()[:2] == public.split()[:2]:
                raise ValueError(f"{public_key}: is the key of site {other}; every site needs one of its own")
    bundle.mkdir(parents=True)
    bundle.chmod(0o700)
    if public is None:
        public = keys.make_node_key(bundle / "node.key", site)
    if (certificate := federation.certificate) is not None:
        files.write_bytes(bundle / "ca.pem", certificate)
    files.write_text(bundle / CONNECTION, _connection_text(federation, site, public_key is None))
    files.write_text(bundle / "site.yaml", _site_text(site))
    files.write_bytes(known, public)  # last: with it the site is let in
    return bundle


def remove_site(federation: Federation, site: str) -> None:
    """Shut a site out; its bundle, if it still lies here, is kept under another name.

    Raises:
        ValueError: no such site.
    """
    known, bundle = federation.folder / "sites" / f"{site}.pub", federation.bundle(site)
    if not known.is_file():
        raise ValueError(f"{site}: no such site; there are: {', '.join(federation.sites()) or 'none'}")
    known.unlink()
    if bundle.exists():
        (federation.folder / "removed").mkdir(exist_ok=True)
        bundle.rename(federation.folder / "removed" / f"{site}-{secrets.token_hex(4)}")


def renew(federation: Federation, hosts: Sequence[str]) -> Federation:
    """Issue a new server key and certificate; the old ones are kept under another name.

    Args:
        federation: one with TLS.
        hosts: in the place of those so far; [] keeps them.

    Raises:
        ValueError: a federation without TLS, a host that is none, or the authority's key is not here.
    """
    if federation.settings.insecure:
        raise ValueError(f"{federation.folder}: has no certificates, since it is insecure")
    values = {**federation.settings.model_dump(mode="json"), **({"hosts": list(hosts)} if hosts else {})}
    settings, aside = _checked(values, "--host"), secrets.token_hex(4)
    with tempfile.TemporaryDirectory(dir=federation.folder) as made:
        fresh = Path(made)
        for name in ("ca.key", "ca.pem"):
            keys.write_private(fresh / name, keys.read(federation.folder / name))
        keys.issue_certificate(fresh, settings.hosts)
        for name in ("server.key", "server.pem"):
            kept = federation.folder / "removed" / f"{aside}-{name}"
            kept.parent.mkdir(exist_ok=True)
            (federation.folder / name).rename(kept)
            (fresh / name).rename(federation.folder / name)
    files.write_text(federation.folder / SETTINGS, _text(settings))
    return Federation(federation.folder, settings)


def running(federation: Federation) -> psutil.Process | None:
    """The coordinator's process, None when none runs here."""
    try:
        stand: dict[str, Any] = files.parse_json((federation.folder / STAND).read_bytes())
        process = psutil.Process(int(stand["process"]))
        return process if process.create_time() == stand["since"] and runs(process) else None
    except (OSError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):
        return None


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def joined(host: str, port: int) -> str:
    """`host:port`, as URLs write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _connection_text(federation: Federation, site: str, key_made: bool) -> str:
    lines = [f"# How site {site} reaches its coordinator. Written there; nothing to fill in.", f"address: {federation.address}"]
    if federation.settings.insecure:
        lines.append("insecure: true # no TLS, no key: only on the coordinator's own machine")
    else:
        made = "never leaves this site" if key_made else "put the private half of the key that you made here, under this name"
        lines += ["certificate: ca.pem # proves that it is the coordinator", f"key: node.key # proves that it is this site; {made}"]
    return "\n".join(lines) + "\n"


def _site_text(site: str) -> str:
    return f"""# Site {site}: fill in where rows and model lie, read what may leave, then start it with: fedgraft site --policy site.yaml
name: {site}

data: # rows of this site, in the place of what a recipe says; relative paths start from this file's folder
  dataset: jsonl
  path: rows # with one file, {site}.jsonl, which gives the client its name
  partition: files

model: # where the base model lies here: a folder, a hub name, or demo
  name: demo

policy: # what a coordinator may ask for
  min_examples: 1
"""


def _text(settings: FederationFile) -> str:
    values = settings.model_dump(mode="json")
    lines = [f"{name}: {json.dumps(value)} # {FederationFile.model_fields[name].description}" for name, value in values.items()]
    return "\n".join(["# A federation, as its coordinator keeps it.", *lines]) + "\n"


def _checked(values: dict[str, Any], where: str) -> FederationFile:
    try:
        settings = FederationFile.model_validate(values)
        ipaddress.ip_address(settings.listen)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise ValueError(f"{where}: {'; '.join(lines)}") from None
    except ValueError:
        raise ValueError(f"{where}: listen: {values['listen']!r} is not an address of this machine, such as 0.0.0.0") from None
    return settings
