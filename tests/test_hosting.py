"""A host answers what it is asked in bytes and refuses the rest with a reason."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from fedgraft import hosting
from fedgraft.bundle import Bundle
from fedgraft.engine.card import Card
from fedgraft.engine.wire import Frame
from fedgraft.hosting import Host
from fedgraft.training.client import MemoryStore
from tests.methods.conftest import place

__all__ = ["place"]
NAMES = ["ada", "bo", "cy"]


@pytest.fixture
def host(tmp_path):
    return Host(memories=lambda run: tmp_path / run)


def told(host: Host, kind: str, partition: int | None = 0, content: bytes = b"", **facts) -> Frame:
    return Frame.decode(host.handle(Frame(kind=kind, facts=facts, content=content).encode(), partition))


def training(place, **facts):
    """Facts and content of a first training question."""
    package = Bundle(trees={"shared": {}}, facts={"round": 0, "lr": 1e-3})
    asked = {
        "run": "one",
        "recipe": place.recipe("fedavg"),
        "clients": NAMES,
        "question": "train",
        "client": "ada",
        "asked": 0,
        "committed": 0,
    }
    return {**asked, "content": package.encode(), **facts}


def test_joining_gives_the_card_of_the_nodes_client(place, host):
    for number, name in enumerate(NAMES):
        response = told(host, "join", number, run="one", recipe=place.recipe("fedavg"))
        card = Card.of(response.facts["card"])
        assert (response.kind, card.name) == ("card", name)
        assert card.as_facts() == response.facts["card"]
        assert card.rows == {"train": {"ada": 7, "bo": 12, "cy": 5}[name], "validation": 1, "test": 1}


def test_base_and_rows_are_read_once_a_run(place, host, monkeypatch):
    loads = []
    load = hosting.load_base
    monkeypatch.setattr(hosting, "load_base", lambda settings: loads.append(settings) or load(settings))
    recipe = place.recipe("fedavg")
    for run in ("one", "one", "two"):
        told(host, "join", run=run, recipe=recipe)
        told(host, "ask", **training(place, run=run, question="router"))
    assert len(loads) == 2
    told(host, "leave", run="two")
    told(host, "join", run="two", recipe=recipe)
    assert len(loads) == 3


def test_a_site_with_rows_of_its_own_is_one_client(place, tmp_path):
    rows = place.clients(("bo",))
    host = Host(memories=lambda run: tmp_path / run, data={"path": str(rows)})
    recipe = place.recipe("fedavg") | {"data": {**place.recipe("fedavg")["data"], "path": "/coordinator/has/none"}}
    assert told(host, "join", None, run="one", recipe=recipe).facts["card"]["name"] == "bo"
    assert "/coordinator/has/none" in told(Host(memories=host.memories), "join", None, run="one", recipe=recipe).facts["reason"]


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("sing", {}, "request 'sing' is unknown here"),
        ("ask", {"question": "sing"}, "question 'sing' is unknown here"),
        ("ask", {"client": "dee"}, "client 'dee' is not at this site, which holds ada, bo, cy"),
        ("ask", {"run": "../../etc"}, "the run's id '../../etc' cannot name a folder"),
        ("ask", {"content": b"nonsense"}, "the package for client 'ada': damaged or not written by fedgraft"),
        ("ask", {"recipe": {"method": {"name": "sing"}}}, "unknown method 'sing'"),
        ("ask", {"recipe": {"model": 5}}, "the coordinator's recipe: model: Input should be"),
        ("ask", {"recipe": {"sing": {}}}, "the coordinator's recipe: unknown key 'sing'"),
        ("join", {"partition": None}, "the rows here make 3 clients"),
        ("join", {"partition": 3}, "this is node 3, counted from 0, and the recipe's data make 3 clients"),
    ],
)
def test_what_a_host_cannot_do_is_refused_with_a_reason(place, host, tmp_path, kind, change, reason):
    response = told(host, kind, **training(place) | change)
    assert response.kind == "refused"
    assert reason in response.facts["reason"]
    assert not list(tmp_path.rglob("memory-*"))


def test_damaged_bytes_are_refused(host):
    response = Frame.decode(host.handle(b"nonsense"))
    assert (response.kind, response.facts["reason"][:41]) == ("refused", "the coordinator's request: damaged or not")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"), "out of memory (CUDA out of memory"),
    ],
)
def test_what_the_machine_lacks_is_a_refusal(place, host, monkeypatch, error, reason):
    def failing(*_):
        raise error

    monkeypatch.setattr(MemoryStore, "save", failing)
    given = training(place)
    shared = hosting.Holdings(hosting.check_values(given["recipe"], ""), Path()).model.fresh_adapters(0)
    content = Bundle(trees={"shared": shared}, facts={"round": 0, "lr": 1e-3}).encode()
    response = told(host, "ask", **given | {"content": content})
    assert response.kind == "refused"
    assert reason in response.facts["reason"]


def test_a_bug_is_raised_so_that_the_sites_log_shows_it(place, host, monkeypatch):
    def broken(*_):
        raise KeyError("oops")

    monkeypatch.setattr(MemoryStore, "load", broken)
    with pytest.raises(KeyError, match="oops"):
        told(host, "ask", **training(place))
