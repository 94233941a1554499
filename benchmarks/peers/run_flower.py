"""Flower's simulation with its own FedAvg over the adapters; its actor keeps the base in memory from one client to the next."""

from __future__ import annotations

import flower_apps
from common import work
from flwr.simulation import run_simulation


def main() -> None:
    """All rounds; one actor, so that clients train one after another as everywhere else."""
    backend = {"init_args": {"num_cpus": 1, "include_dashboard": False}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(flower_apps.server, flower_apps.client, num_supernodes=len(work().clients), backend_config=backend)


if __name__ == "__main__":
    main()
