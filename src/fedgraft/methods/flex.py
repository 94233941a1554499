"""FLEx (arXiv 2506.00965): attention LoRA is averaged; each client keeps an expert of its own per layer, grafted beside the frozen ones."""

from __future__ import annotations

from fedgraft.methods.method import Method, side_only


def build() -> Method:
    """Side experts and their gates stay on the client; the rest is FedAvg."""
    return Method(places=frozenset({"adapters", "side"}), personal=side_only)
