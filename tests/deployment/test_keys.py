"""Certificates and keys: verified by the TLS library and by Flower's own reading, not by looking at our own fields."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading

import pytest

from fedgraft.deployment import keys

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="modes of files are POSIX")


def handshake(folder, authority, host):
    """A TLS connection over a pair of sockets, as `host`; raises what the client's side raises."""
    near, far = socket.socketpair()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(folder / "server.pem", folder / "server.key")

    def accept():
        try:
            server.wrap_socket(far, server_side=True).close()
        except (ssl.SSLError, OSError):
            far.close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        client = ssl.create_default_context(cafile=str(authority))
        client.verify_flags |= ssl.VERIFY_X509_STRICT  # what Python 3.13 does by default
        client.wrap_socket(near, server_hostname=host).close()
    finally:
        near.close()
        thread.join()


@pytest.fixture
def made(tmp_path):
    keys.make_authority(tmp_path, "hospitals")
    keys.issue_certificate(tmp_path, ["coordinator.example.org", "192.0.2.7"])
    return tmp_path


@pytest.mark.parametrize("host", ["coordinator.example.org", "192.0.2.7", "localhost", "127.0.0.1"])
def test_certificate_holds_for_its_names_and_addresses(made, host):
    handshake(made, made / "ca.pem", host)


def test_certificate_holds_for_no_other_name(made):
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(made, made / "ca.pem", "other.example.org")


def test_certificate_of_another_authority_is_refused(made, tmp_path):
    keys.make_authority(tmp_path / "other", "others")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made, tmp_path / "other" / "ca.pem", "localhost")


@POSIX
def test_private_keys_are_their_owners_alone(made):
    keys.make_node_key(made / "node.key", "berlin")
    assert {(made / name).stat().st_mode & 0o777 for name in ("ca.key", "server.key", "node.key")} == {0o600}
    keys.refuse_readable(made / "node.key")
    (made / "node.key").chmod(0o640)
    with pytest.raises(ValueError, match=r"node.key: others .* chmod 600"):
        keys.refuse_readable(made / "node.key")


def test_no_key_is_overwritten(made):
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    for again in (lambda: keys.make_authority(made, "x"), lambda: keys.issue_certificate(made, ["x"])):
        with pytest.raises(ValueError, match="never overwritten"):
            again()
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def test_flower_takes_a_node_key(tmp_path):
    """By the functions of `flower-supernode` and `flwr supernode register` themselves."""
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    (tmp_path / "node.pub").write_bytes(public := keys.make_node_key(tmp_path / "node.key", "berlin"))
    private = load_ssh_private_key((tmp_path / "node.key").read_bytes(), None)
    assert public_key_to_bytes(private.public_key()) == try_load_public_key(tmp_path / "node.pub")
    assert public.split()[0] == b"ecdsa-sha2-nistp384"
    keys.check_public(public, "node.pub")


@pytest.mark.parametrize(
    ("kind", "says"), [("rsa", "another kind"), ("ecdsa", "another kind"), ("private", "must stay at the site"), ("", "not a public")]
)
def test_other_keys_are_refused(tmp_path, kind, says):
    content = b"hello\n"
    if kind == "private":
        keys.make_node_key(tmp_path / "node.key", "berlin")
        content = (tmp_path / "node.key").read_bytes()
    elif kind:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec, rsa

        key = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(ec.SECP256R1())
        content = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    with pytest.raises(ValueError, match=says):
        keys.check_public(content, "node.pub")


@pytest.mark.parametrize("host", ["https://x.org", "x.org:9092", "", "größe.de", "a b"])
def test_a_host_is_a_name_or_an_address(made, host):
    (made / "server.key").unlink()
    with pytest.raises(ValueError, match="name or an address"):
        keys.issue_certificate(made, [host])
    assert not (made / "server.key").exists()


def test_openssl_agrees(made):
    """An independent implementation verifies the chain, where there is one."""
    try:
        words = ["openssl", "verify", "-x509_strict", "-CAfile", "ca.pem", "-verify_hostname", "coordinator.example.org", "server.pem"]
        done = subprocess.run(words, cwd=made, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no openssl here")
    assert done.returncode == 0, done.stdout + done.stderr
