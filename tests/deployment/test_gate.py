"""From other machines only the Fleet API answers."""

from __future__ import annotations

import asyncio

import pytest

from fedgraft.engine.superlink import Gate, is_near

FAR, NEAR = ("192.0.2.7", 4000), ("127.0.0.1", 4000)


def status(path, client, kind="http"):
    """What the gate answers; 200 when it let the request through."""
    sent = []

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    asyncio.run(Gate(inner)({"type": kind, "path": path, "client": client}, None, send))
    return sent[0]["status"] if sent else None


@pytest.mark.parametrize(
    "path", ["/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task", "/docs", "/", "/v1/fleetx", ""]
)
def test_what_sites_do_not_need_is_closed_to_other_machines(path):
    assert status(path, FAR) == 403
    assert status(path, NEAR) == 200


def test_sites_reach_the_fleet_api():
    assert status("/v1/fleet/pull-messages", FAR) == 200


def test_other_kinds_of_requests_are_dropped():
    assert status("/v1/control/stream", FAR, kind="websocket") is None


@pytest.mark.parametrize(
    ("client", "near"),
    [
        (NEAR, True),
        (("::1", 1), True),
        (("::ffff:127.0.0.1", 1), True),
        (FAR, False),
        (("::ffff:192.0.2.7", 1), False),
        (None, False),
        (("", 0), False),
    ],
)
def test_near_is_this_machine(client, near):
    assert is_near(client) is near


def test_the_superlink_has_the_gate_outermost(monkeypatch):
    """By Flower's own list of what a request passes."""
    from flwr.superlink import extensions
    from flwr.superlink import main as flower

    from fedgraft.engine import superlink

    monkeypatch.setattr(extensions, "get_middleware", extensions.get_middleware)
    monkeypatch.setattr(superlink, "flower_superlink", lambda: None)
    superlink.main()
    assert flower._get_middleware()[0].cls is Gate
