"""How a federation stands, and stopping its coordinator."""

from __future__ import annotations

from typing import Any

from fedgraft.deployment.coordinator import days_left
from fedgraft.deployment.federation import Federation, running
from fedgraft.deployment.processes import GRACE, end


def standing(federation: Federation) -> dict[str, Any]:
    """As one document: process (None when no coordinator runs here), sites and runs with their states."""
    process = running(federation)
    sites, runs = dict.fromkeys(federation.sites(), "not known while no coordinator runs"), []
    if process is not None:
        from fedgraft.engine.control import Control

        control = Control(federation.local_address, federation.certificate)
        try:
            states = {node.name or f"without a key ({node.id})": node.status for node in control.nodes()}
            sites = {name: states.get(name, "not let in yet") for name in sites} | states
            runs = [{"run": run.id, "state": run.outcome or run.status, "details": run.details} for run in control.runs()]
        finally:
            control.close()
    return {
        "name": federation.name,
        "folder": str(federation.folder),
        "address": federation.address,
        "process": process.pid if process else None,
        "certificate_days": None if federation.settings.insecure else days_left(federation.folder / "server.pem"),
        "sites": [{"site": name, "state": state} for name, state in sites.items()],
        "runs": runs,
    }


def stop(federation: Federation) -> bool:
    """Stop the coordinator that runs here with all its processes; returns whether one did."""
    process = running(federation)
    if process is None:
        return False
    end([process], grace=6 * GRACE)  # it stops its own first
    return True
