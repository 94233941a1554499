"""The federation's folder: what is made, what is refused, and that nothing is overwritten."""

from __future__ import annotations

import json
import os

import psutil
import pytest
import yaml

from fedgraft.deployment import federation as fed
from fedgraft.deployment.connection import load_connection
from fedgraft.deployment.site_settings import load_site


def make(folder, hosts=("coordinator.example.org",), **options):
    return fed.create(folder, list(hosts), **{"port": 9092, "listen": "0.0.0.0", "insecure": False, **options})


@pytest.fixture
def made(tmp_path):
    return make(tmp_path / "hospitals")


def test_a_bundle_is_what_a_site_needs(made):
    bundle = fed.add_site(made, "berlin")
    assert sorted(path.name for path in bundle.iterdir()) == ["ca.pem", "coordinator.yaml", "node.key", "site.yaml"]
    connection = load_connection(bundle / "coordinator.yaml")
    assert connection.address == "coordinator.example.org:9092"
    assert connection.certificate.read_bytes() == made.certificate
    settings, _ = load_site(bundle / "site.yaml")
    assert (settings.name, settings.model.name) == ("berlin", "demo")
    assert fed.find(made.folder).sites().keys() == {"berlin"}


def test_settings_survive_the_file(made):
    assert fed.find(made.folder).settings == made.settings


def test_a_site_can_keep_its_key_to_itself(made, tmp_path):
    from fedgraft.deployment import keys

    (tmp_path / "own.pub").write_bytes(public := keys.make_node_key(tmp_path / "own.key", "x"))
    bundle = fed.add_site(made, "paris", tmp_path / "own.pub")
    assert not (bundle / "node.key").exists()
    assert made.sites()["paris"] == public
    with pytest.raises(ValueError, match="is the key of site paris"):
        fed.add_site(made, "rome", tmp_path / "own.pub")


def test_a_site_is_let_in_once_and_shut_out_with_its_key_kept(made):
    bundle = fed.add_site(made, "berlin")
    secret = (bundle / "node.key").read_bytes()
    with pytest.raises(ValueError, match="is a site already"):
        fed.add_site(made, "berlin")
    fed.remove_site(made, "berlin")
    assert made.sites() == {}
    assert [path.read_bytes() for path in (made.folder / "removed").glob("berlin-*/node.key")] == [secret]
    fed.add_site(made, "berlin")
    with pytest.raises(ValueError, match="no such site; there are: berlin"):
        fed.remove_site(made, "paris")


@pytest.mark.parametrize("name", ["../x", "", "a b", ".hidden"])
def test_a_site_name_is_fit_for_a_file(made, name):
    with pytest.raises(ValueError, match="a name is letters"):
        fed.add_site(made, name)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "note.txt").touch()
    with pytest.raises(ValueError, match="never overwritten"):
        make(tmp_path)


def test_insecure_stays_within_the_machine(tmp_path):
    for host in ("coordinator.example.org", "192.0.2.7"):
        with pytest.raises(ValueError, match=r"only 127\.0\.0\.1 is allowed"):
            make(tmp_path / "x", [host], insecure=True)
    made = make(tmp_path / "x", ["127.0.0.1"], insecure=True, listen="0.0.0.0")
    assert made.settings.listen == "127.0.0.1"
    bundle = fed.add_site(made, "here")
    assert sorted(path.name for path in bundle.iterdir()) == ["coordinator.yaml", "site.yaml"]
    assert load_connection(bundle / "coordinator.yaml").words() == ["--superlink", "127.0.0.1:9092", "--insecure"]


@pytest.mark.parametrize("key", ["hosts", "listen"])
def test_insecure_by_hand_is_refused_too(tmp_path, key):
    made = make(tmp_path / "x", ["127.0.0.1"], insecure=True)
    file = made.folder / fed.SETTINGS
    values = yaml.safe_load(file.read_text(encoding="utf-8")) | {key: {"hosts": ["a.example.org"], "listen": "0.0.0.0"}[key]}
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(ValueError, match="insecure: true is only for"):
        fed.find(made.folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"insecure": True}, "without TLS"),
        ({"address": "nowhere"}, "HOST:PORT"),
        ({"certificate": "x.pem"}, "x.pem: missing"),
        ({"adress": ""}, "adress"),
    ],
)
def test_a_connection_that_cannot_be_is_refused(made, change, says):
    file = fed.add_site(made, "berlin") / "coordinator.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        load_connection(file)


def test_renewal_keeps_the_authority_and_the_old_certificate(made):
    before = {name: (made.folder / name).read_bytes() for name in ("ca.pem", "ca.key", "server.pem", "server.key")}
    renewed = fed.renew(made, ["new.example.org"])
    after = {name: (made.folder / name).read_bytes() for name in before}
    assert [name for name in before if before[name] != after[name]] == ["server.pem", "server.key"]
    assert {path.read_bytes() for path in (made.folder / "removed").iterdir()} == {before["server.pem"], before["server.key"]}
    assert fed.find(made.folder).settings.hosts == renewed.settings.hosts == ("new.example.org",)
    if os.name == "posix":
        assert (made.folder / "server.key").stat().st_mode & 0o777 == 0o600


def test_a_coordinator_is_known_by_process_and_its_start(made):
    assert fed.running(made) is None
    me = psutil.Process()
    stand = {"process": me.pid, "since": me.create_time(), "address": made.address}
    (made.folder / fed.STAND).write_text(json.dumps(stand), encoding="utf-8")
    assert fed.running(made) == me
    stand["since"] -= 1.0  # the number was given to another process since
    (made.folder / fed.STAND).write_text(json.dumps(stand), encoding="utf-8")
    assert fed.running(made) is None


def test_a_name_is_looked_for_under_federations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "federations" / "clinics")
    assert fed.find("clinics").name == "clinics"
    with pytest.raises(ValueError, match="no federation there"):
        fed.find("other")
