"""The federation's certificate authority, the coordinator's certificate, and the keys by which it knows its sites.

All private keys are files of mode 0600, and none is ever overwritten.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from fedgraft import files

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

AUTHORITY_DAYS, SERVER_DAYS = 3650, 730
HERE = ("localhost", "127.0.0.1", "::1")
"""Names by which the coordinator's own commands reach it."""


def make_authority(folder: Path, name: str) -> None:
    """Write `ca.key` and `ca.pem`.

    Raises:
        ValueError: there is one already.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    key = _fresh()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedgraft federation {name}"[:64])])
    builder = _dated(x509.CertificateBuilder(), AUTHORITY_DAYS).subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    write_private(folder / "ca.key", _pem(key))
    files.write_bytes(folder / "ca.pem", _certificate_pem(builder.sign(key, hashes.SHA384())))


def issue_certificate(folder: Path, hosts: Sequence[str]) -> None:
    """Write `server.key` and `server.pem`, signed by the folder's authority, for these names and addresses and for this machine itself.

    Raises:
        ValueError: no authority here; a server key is there already; a host name that is none.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    names = [_alternative(host) for host in dict.fromkeys([*hosts, *HERE])]
    authority = x509.load_pem_x509_certificate(read(folder / "ca.pem"))
    signer = serialization.load_pem_private_key(read(folder / "ca.key"), None)
    assert isinstance(signer, EllipticCurvePrivateKey)
    key = _fresh()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    builder = _dated(x509.CertificateBuilder(), SERVER_DAYS).subject_name(subject).issuer_name(authority.subject)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    write_private(folder / "server.key", _pem(key))
    files.write_bytes(folder / "server.pem", _certificate_pem(builder.sign(signer, hashes.SHA384())))


def make_node_key(private: Path, name: str) -> bytes:
    """Write a site's private key (ECDSA P-384); returns its public half, an OpenSSH line as `flwr supernode register` takes it.

    Raises:
        ValueError: a key is there already.
    """
    from cryptography.hazmat.primitives import serialization

    key = _fresh()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    write_private(private, secret)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return public + f" {name}\n".encode()


def check_public(content: bytes, where: str) -> None:
    """Let only a public key pass that a node can be known by.

    Raises:
        ValueError: it is a private key, no key, or of another kind.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey

    make = "make one with: ssh-keygen -t ecdsa -b 384 -N '' -f node.key"
    if b"PRIVATE KEY" in content:
        raise ValueError(f"{where}: this is the private key, which must stay at the site; give the file that ends in .pub")
    try:
        key = serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(f"{where}: not a public key in OpenSSH's format; {make}") from None
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise ValueError(f"{where}: a key of another kind than ECDSA P-384; {make}")


def expiry(certificate: Path) -> datetime:
    """Until when a certificate holds."""
    from cryptography import x509

    return x509.load_pem_x509_certificate(read(certificate)).not_valid_after_utc


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a certificate (PEM), however its file ends its lines."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    return x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex()


def sign(private: bytes, content: bytes) -> bytes:
    """A signature by a site's private key, as `make_node_key` or ssh-keygen writes it.

    Raises:
        ValueError: it is none, or it has a password.
    """
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey

    try:
        key = serialization.load_ssh_private_key(private, None)
    except (ValueError, TypeError):
        raise ValueError("the site's key is no private key in OpenSSH's format without a password; restore it from a copy") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ValueError("the site's key is of another kind than ECDSA P-384; restore it from a copy")
    return key.sign(content, ECDSA(hashes.SHA384()))


def public_half(private: bytes) -> str:
    """The public half of a site's private key, as an OpenSSH line without a name."""
    from cryptography.hazmat.primitives import serialization

    public = serialization.load_ssh_private_key(private, None).public_key()
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def is_signed(public: bytes, content: bytes, signature: bytes) -> bool:
    """Whether the private half of this key (an OpenSSH line) has signed it."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey

    key = serialization.load_ssh_public_key(public)
    assert isinstance(key, EllipticCurvePublicKey)
    try:
        key.verify(signature, content, ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def write_private(path: Path, content: bytes) -> None:
    """A new file that only its owner can read.

    Raises:
        ValueError: there is one already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ValueError(f"{path}: a key is there already and is never overwritten; move it away first if it is to be replaced") from None
    with open(handle, "wb") as sink:
        sink.write(content)
        sink.flush()
        os.fsync(sink.fileno())


def refuse_readable(path: Path) -> None:
    """Let a private key pass only if nobody else on the machine can read it (where the system has such modes).

    Raises:
        ValueError: others can; or no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such key; it comes with the folder that the coordinator made for this site")
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise ValueError(f"{path}: others on this machine can read this key; change that with: chmod 600 {path}")


def read(path: Path) -> bytes:
    """A key or certificate.

    Raises:
        ValueError: it is missing.
    """
    if not path.is_file():
        raise ValueError(f"{path}: missing; restore it from a copy, or begin anew with: fedgraft federation init")
    return path.read_bytes()


def _fresh() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def _pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM)


def _dated(builder: x509.CertificateBuilder, days: int) -> x509.CertificateBuilder:
    """Valid from an hour ago, since clocks differ."""
    now = datetime.now(UTC)
    return builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=days))


def _usage(*, signs: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host.isascii() or "/" in host or ":" in host or " " in host or not host:
        raise ValueError(f"--host {host}: give a name or an address alone, as in coordinator.example.org or 192.0.2.7")
    return x509.DNSName(host)
