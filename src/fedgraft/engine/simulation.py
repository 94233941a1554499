"""Flower's simulation beside a run: its runtime works in threads of its own, and the run asks through the grid it opens."""

from __future__ import annotations

import logging
import math
import os
import threading
import warnings
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any

from fedgraft.engine.flower import Handle, client_app, prepare
from fedgraft.engine.settings import SimulationSettings

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

START_SECONDS = 120.0
"""Longest wait for the grid, which is there before Ray is."""


class Simulation:
    """A running simulation with one node per client; `close` ends it and its processes."""

    def __init__(self, settings: SimulationSettings, handle: Handle, nodes: int) -> None:
        """Start it.

        Args:
            settings: processors and GPUs of each client.
            handle: what a node does with a request; it is sent to other processes.
            nodes: how many there are.

        Raises:
            ValueError: Flower or Ray is not installed, or it does not start.
        """
        prepare("flwr", "ray")
        self._opened: Queue[Grid] = Queue()
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(settings, handle, nodes), name="flower-simulation", daemon=True)
        self._thread.start()
        self.grid = self._first_grid()

    def close(self) -> None:
        """End it; waits until its processes are gone."""
        self._over.set()
        self._thread.join()

    def check(self) -> None:
        """Pass while it runs.

        Raises:
            ValueError: it has broken down.
        """
        if self._error is not None or not self._thread.is_alive():
            raise ValueError(f"engine: Flower's simulation has ended ({self._error or 'no reason given'}); resume the run")

    def _first_grid(self) -> Grid:
        for _ in range(int(START_SECONDS)):
            try:
                return self._opened.get(timeout=1.0)
            except Empty:
                self.check()
        raise ValueError(f"engine: Flower's simulation has not started within {START_SECONDS:g} s")

    def _work(self, settings: SimulationSettings, handle: Handle, nodes: int) -> None:
        from flwr.serverapp import ServerApp
        from flwr.simulation import run_simulation

        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            self._opened.put(grid)
            self._over.wait()

        for name in ("flwr", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Flower's and Ray's, about each other and themselves
                run_simulation(app, client_app(handle), nodes, backend_config=_backend(settings, nodes))
        except BaseException as error:
            self._error = error


def _backend(settings: SimulationSettings, nodes: int) -> dict[str, Any]:
    """Ray with no more processes than there are nodes, silent, without its dashboard."""
    useful = min(os.cpu_count() or 1, math.ceil(settings.cpus * nodes))
    return {
        "init_args": {
            "num_cpus": max(useful, math.ceil(settings.cpus)),
            "include_dashboard": False,
            "logging_level": logging.ERROR,
            "log_to_driver": False,
            "configure_logging": False,
        },
        "client_resources": {"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    }
