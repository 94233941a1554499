"""Local: the control without federation."""

from __future__ import annotations

from fedgraft.bundle import Bundle
from fedgraft.tree import equal


def test_nothing_but_figures_is_sent(start):
    run = start("local").go()
    for _, _, content in run.down + run.up:
        assert not any(Bundle.decode(content).trees.values())
        assert b"layers." not in content
    assert run.session.server.state.digest() == Bundle().digest()


def test_answers_are_the_clients_own(start):
    run = start("local").go()
    method, client = run.session.method, run.session.reach.holdings.open("cy")
    client.memory = run.memory("cy")
    answers = method.answer(method, client, method.pack(method, run.session.server, "cy"))
    assert list(answers) == ["base", "personal"]
    assert equal(answers["personal"].tree, client.memory.tree("personal"))


def test_a_client_that_never_trained_answers_with_its_start(start):
    """B = 0, so it is the base."""
    run = start("local")
    method, client = run.session.method, run.session.reach.holdings.open("cy")
    answers = method.answer(method, client, method.pack(method, run.session.server, "cy"))
    assert equal(answers["personal"].tree, run.session.reach.holdings.model.fresh_adapters(0))
