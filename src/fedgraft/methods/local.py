"""Local: every client trains the same attention LoRA alone; nothing is sent."""

from __future__ import annotations

from fedgraft.address import everything
from fedgraft.methods.method import Method


def build() -> Method:
    """Every leaf is personal."""
    return Method(personal=everything)
