"""Centralised: one site trains the same LoRA on the rows of all clients together, an upper bound for which data leave the clients."""

from __future__ import annotations

from fedgraft.methods.method import Method


def build() -> Method:
    """Nothing of a federation: in a round the site does the steps of all clients of that round on the pooled rows.

    The leaves go from round to round as FedAvg's do with a single client, and every client is evaluated with them on its own rows.
    """
    return Method(pooled=True, needs_mean="has one site, so that there is nothing to merge")
