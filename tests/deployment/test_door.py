"""The door: nobody else enters, the dead are replaced, the living are respected."""

from __future__ import annotations

import os
import socket
import stat

import pytest

from fedgraft.deployment import door, frames
from tests.deployment.conftest import ask

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes of files")
BOTH = pytest.mark.parametrize("loopback", [False, True], ids=["unix", "loopback"])


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_folder_and_socket_are_private_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with door.opened(tmp_path / "a" / "door"):
            found = mode(tmp_path / "a" / "door"), mode(tmp_path / "a" / "door" / door.SOCKET)
    finally:
        os.umask(before)
    assert found == (0o700 & ~umask, 0o600)


def test_the_socket_has_no_other_mode_between_two_calls(tmp_path, monkeypatch):
    modes = []
    listen = socket.socket.listen
    monkeypatch.setattr(
        socket.socket, "listen", lambda self, *rest: (modes.append(mode(tmp_path / "door" / door.SOCKET)), listen(self, *rest))
    )
    with door.opened(tmp_path / "door"):
        assert modes == [0o600]


def test_loopback_alone_and_a_private_token(tmp_path):
    with door.opened(tmp_path / "door", loopback=True) as opened:
        assert opened.listener.getsockname()[0] == "127.0.0.1"
        assert mode(tmp_path / "door" / door.TOKEN) == 0o600
        first = opened.token
    with door.opened(tmp_path / "door", loopback=True) as opened:
        assert len(opened.token) == 64
        assert opened.token != first


@pytest.mark.parametrize(
    ("header", "admitted"),
    [({"token": "a" * 64}, True), ({"token": "b" * 64}, False), ({"token": ""}, False), ({}, False), ({"token": 7}, False)],
)
def test_the_token_decides(header, admitted):
    with socket.socket() as listener:
        assert door.Door(listener, "a" * 64).admits(header) is admitted


@pytest.mark.parametrize("loose", [0o750, 0o701, 0o777])
def test_a_folder_that_others_may_enter_is_refused(tmp_path, loose):
    (tmp_path / "door").mkdir()
    (tmp_path / "door").chmod(loose)
    with pytest.raises(ValueError, match="chmod 700"), door.opened(tmp_path / "door"):
        pass


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "door").mkdir(mode=0o700)
    try:
        os.chown(tmp_path / "door", 12345, -1)
    except PermissionError:
        pytest.skip("only root can give folders away")
    with pytest.raises(ValueError, match="another user"), door.opened(tmp_path / "door"):
        pass


@BOTH
def test_what_a_dead_worker_left_is_replaced(tmp_path, start, loopback):
    options = ["--loopback"] * loopback
    first = start(tmp_path / "door", *options)
    first.kill()
    first.wait()
    assert (tmp_path / "door" / door.NOTICE).exists()
    with pytest.raises(door.NoWorkerError, match=str(first.pid)):
        door.connect(tmp_path / "door")
    second = start(tmp_path / "door", *options)
    assert ask(tmp_path / "door", b"echo:hello") == ({"verdict": "answered"}, b"hello")
    assert second.pid != first.pid


@BOTH
def test_a_live_worker_is_respected_and_named(tmp_path, start, loopback):
    options = ["--loopback"] * loopback
    first = start(tmp_path / "door", *options)
    second = start(tmp_path / "door", *options, waits=False)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"(process {first.pid})" in err
    assert ask(tmp_path / "door", b"echo:still here")[1] == b"still here"


def test_something_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "door").mkdir(mode=0o700)
    (tmp_path / "door" / door.SOCKET).write_text("a letter")
    with pytest.raises(ValueError, match="no socket"), door.opened(tmp_path / "door"):
        pass
    assert (tmp_path / "door" / door.SOCKET).read_text() == "a letter"


def test_a_path_too_long_names_the_key(tmp_path):
    with pytest.raises(ValueError, match="set `socket`"), door.opened(tmp_path / ("long" * 30)):
        pass


def test_no_worker_ever(tmp_path):
    with pytest.raises(door.NoWorkerError, match="no worker listens"):
        door.connect(tmp_path)


def test_systems_without_unix_sockets_listen_on_loopback(tmp_path, monkeypatch):
    monkeypatch.delattr(socket, "AF_UNIX")
    with door.opened(tmp_path / "door") as opened:
        assert opened.listener.family == socket.AF_INET
        connection, token = door.connect(tmp_path / "door")
        with connection:
            assert token == opened.token


def test_without_the_token_nothing_is_answered(tmp_path, start):
    start(tmp_path / "door", "--loopback")
    connection, _ = door.connect(tmp_path / "door")
    with connection:
        frames.send(connection, {"kind": "question", "token": "0" * 64}, b"echo:secret")
        header, length = frames.receive_header(connection)
    assert (header["verdict"], length) == ("failed", 0)
    assert "wrong token" in header["reason"]
