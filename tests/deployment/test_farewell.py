"""Who may take a site out of a federation: the site itself, now, and nobody else."""

from __future__ import annotations

import asyncio
import json

import pytest

from fedgraft.deployment import departure, farewell, keys
from fedgraft.deployment import federation as fed
from fedgraft.deployment.connection import load_connection
from fedgraft.deployment.farewell import DONE, REPEATED, Farewell, signed
from fedgraft.engine.superlink import MOST_BYTES, Gate
from tests.run.conftest import command  # noqa: F401  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in Click:DeprecationWarning")


@pytest.fixture
def made(tmp_path):
    """A federation with two sites."""
    federation = fed.create(tmp_path / "fed", ["127.0.0.1"], port=9092, listen="127.0.0.1", insecure=False)
    for site in ("north", "south"):
        fed.add_site(federation, site)
    return federation


def key(federation, site):
    return (federation.bundle(site) / "node.key").read_bytes()


def say(door, federation, site="north", private=None, challenge=None):
    """The statement that a site would send."""
    given = door.hear(b"")[1] if challenge is None else challenge
    return signed(site, federation.certificate, given, private or key(federation, site))


def test_a_site_that_leaves_is_let_in_no_more(made):
    door, private = Farewell(made), key(made, "north")
    assert door.hear(say(door, made)) == (200, DONE)
    assert list(made.sites()) == ["south"]
    (note,) = (made.folder / "removed").glob("north-*.left.json")
    told = json.loads(note.read_bytes())
    assert keys.is_signed(told["key"].encode(), told["said"].encode(), bytes.fromhex(told["signature"]))  # it can be shown later
    assert door.hear(say(door, made, private=private)) == (200, REPEATED)


def test_a_statement_holds_once(made):
    """Even where the coordinator lets the same key in again."""
    door = Farewell(made)
    private, public = key(made, "north"), made.folder / "sites" / "north.pub"
    content, said = public.read_bytes(), say(door, made)
    assert door.hear(said)[0] == 200
    public.write_bytes(content)
    assert door.hear(said)[0] == 403
    assert Farewell(made).hear(said)[0] == 403  # after a restart
    assert list(made.sites()) == ["north", "south"]
    assert door.hear(say(door, made, private=private)) == (200, DONE)


def test_forged_statements_change_nothing(made, tmp_path, monkeypatch):
    door, other = Farewell(made), tmp_path / "other"
    keys.make_authority(other, "other")
    challenge = door.hear(b"")[1]
    elsewhere = signed("north", (other / "ca.pem").read_bytes(), challenge, key(made, "north"))
    forged = [
        say(door, made, private=key(made, "south")),  # one site cannot take out another
        elsewhere,  # said to another federation that knows the same key
        say(door, made, challenge="1.ab.cd"),
        say(door, made, challenge="no challenge"),
        say(door, made, challenge="x." + challenge.partition(".")[2]),
        json.dumps({**json.loads(say(door, made)), "site": "south"}).encode(),
        json.dumps({**json.loads(say(door, made)), "signature": "00"}).encode(),
    ]
    assert [door.hear(one)[0] for one in forged] == [403] * len(forged)
    assert [
        door.hear(one)[0]
        for one in (b"{", b"[]", b'{"site": "north"}', b"\xff", say(door, made, site="../north", private=key(made, "north")))
    ] == [400] * 5
    late = say(door, made)
    clock = farewell.time.time() + farewell.LIFE + 1
    monkeypatch.setattr(farewell.time, "time", lambda: clock)
    assert door.hear(late)[0] == 403
    assert list(made.sites()) == ["north", "south"]


def test_a_key_that_has_left_cannot_take_out_its_successor(made):
    door, old = Farewell(made), key(made, "north")
    assert door.hear(say(door, made))[0] == 200
    fed.add_site(made, "north")
    assert door.hear(say(door, made, private=old)) == (200, REPEATED)
    assert list(made.sites()) == ["north", "south"]


def posted(gate, path, body, method="POST"):
    """Status and text of a request from another machine."""
    sent, parts = [], [body[at : at + 1000] for at in range(0, len(body) or 1, 1000)]

    async def receive():
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "client": ("192.0.2.7", 1), "headers": []}
    asyncio.run(gate(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


def test_the_gate_has_a_door_that_takes_so_much_and_no_more():
    gate = Gate(lambda *_: None, {"/leave": lambda body: (200, str(len(body)))})
    assert posted(gate, "/leave", b"x" * 2500) == (200, b"2500")
    assert posted(gate, "/leave", b"x" * (MOST_BYTES + 1))[0] == 413
    assert posted(gate, "/leave", b"", "GET")[0] == 405
    assert posted(gate, "/leave/", b"")[0] == 403


def moved(made, tmp_path):
    home = made.bundle("north").rename(tmp_path / "north")
    (home / "rows").mkdir()
    return home


def test_without_an_answer_nothing_is_changed(made, tmp_path, command):  # noqa: F811
    home = moved(made, tmp_path)
    connection = (home / "coordinator.yaml").read_text(encoding="utf-8")
    (home / "coordinator.yaml").write_text(connection.replace("9092", "1"), encoding="utf-8")
    done = command("site", "--policy", home / "site.yaml", "--leave")
    assert (done.code, "nothing was changed; repeat this when it is up" in done.err) == (2, True)
    assert not (home / "flower" / departure.LEFT).exists()


def test_the_site_s_end(made, tmp_path, command, monkeypatch):  # noqa: F811
    """With the coordinator's door in the place of the network."""
    home, door = moved(made, tmp_path), Farewell(made)
    memory = home / "state" / "runs" / "ab12" / "clients" / "north" / "memory-0000001.safetensors"
    memory.parent.mkdir(parents=True)
    memory.write_bytes(b"x" * 5000)
    monkeypatch.setattr("fedgraft.deployment.connection.Connection.post", lambda self, path, body: door.hear(body))
    done = command("site", "--policy", home / "site.yaml", "--leave")
    assert (done.code, done.err) == (0, "")
    assert f"1 runs, 5 kB, in {home / 'state' / 'runs'}" in done.out
    assert memory.exists()
    assert list(made.sites()) == ["south"]
    assert "has left the federation before" in command("site", "--policy", home / "site.yaml", "--leave").out
    again = command("site", "--policy", home / "site.yaml")
    assert (again.code, "put the new node.key in the place of the old one" in again.err) == (2, True)
    (home / "node.key").unlink()
    keys.make_node_key(home / "node.key", "north")
    departure.refuse_departed(home / "flower", load_connection(home / "coordinator.yaml"))  # with a new key it may come back


def test_a_federation_without_keys_has_no_way_to_know_who_leaves(tmp_path, command):  # noqa: F811
    federation = fed.create(tmp_path / "fed", ["127.0.0.1"], port=9092, listen="127.0.0.1", insecure=True)
    bundle = fed.add_site(federation, "north")
    (bundle / "rows").mkdir()
    done = command("site", "--policy", bundle / "site.yaml", "--leave")
    assert (done.code, "fedgraft federation remove-site" in done.err) == (2, True)
