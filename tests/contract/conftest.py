"""Whole tiny runs, as in the tests of the methods; what costs time and has tests of its own is left out of them."""

from __future__ import annotations

import copy

import pytest

from fedgraft import hosting, session
from fedgraft.moe.load import load_base
from tests.methods.conftest import place, start

__all__ = ["place", "start"]

BASES = {}


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """A base is read once and copied for every run; no pages are drawn."""

    def copied(settings):
        if settings not in BASES:
            BASES[settings] = load_base(settings)
        return copy.deepcopy(BASES[settings])

    monkeypatch.setattr(hosting, "load_base", copied)
    monkeypatch.setattr(session, "leave_page", lambda folder: None)
