"""Records of runs that never were, of any size and at any stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgraft.report.record import Record

DIGEST = "5179332a0c5db91b9c2d2c8ea0357971f1612105faecc0efb7e873d0d7b98723"


def made_record(
    clients: int | list[str] = 3,
    *,
    layers: int = 2,
    experts: int = 8,
    rounds: int = 3,
    done: int | None = None,
    per_layer: int = 1,
    **parts: Any,
) -> Record:
    """A FLEx record with random figures; `done` below `rounds` is one that stopped, keyword parts replace those of the record."""
    rng = np.random.default_rng(0)
    names = [f"client-{number:02}" for number in range(clients)] if isinstance(clients, int) else clients
    done = rounds if done is None else done
    errors = rng.random((len(names), layers, experts)) + 0.5
    chosen = errors.argsort(-1)[..., :per_layer]
    lines = [
        {
            "round": at,
            "lr": 1e-3,
            "loss": 3 - at / 100,
            "seconds": 1.5,
            "tokens": 900,
            "bytes_down": 1000,
            "bytes_up": 1100,
            "clients": {
                name: {"loss": float(rng.normal(3, 0.3)), "tokens": 300, "seconds": 0.5, "examples": 40, "truncated": 2} for name in names
            },
        }
        for at in range(done)
    ]
    figures = {"rows": 10, "truncated": 4, "response_tokens": 500}
    results = {
        name: {
            "base": figures | {"loss": 3.5 + at / 100, "token_accuracy": 0.3, "general_loss": 4.0},
            "personal": figures
            | {"loss": 3.0 + at / 100, "token_accuracy": 0.4, "gate_mean": rng.random((layers, per_layer)).tolist(), "general_loss": 4.1},
        }
        for at, name in enumerate(names)
    }
    finished = done == rounds
    whole: dict[str, Any] = {
        "folder": Path("runs/made"),
        "recipe": {
            "model": {"name": "tiny", "threads": 1},
            "data": {"dataset": "dolly", "max_length": 96, "categories": None},
            "method": {"name": "flex"},
            "graft": {"per_layer": per_layer},
            "selection": {"criterion": "reconstruction"},
            "federation": {"rounds": rounds},
            "evaluation": {"models": ["base", "personal"], "split": "test"},
            "seed": 7,
        },
        "environment": {
            "schema": 1,
            "fedgraft": "0.1.0",
            "packages": {"torch": "2.13.0"},
            "command": ["fedgraft", "run", "my recipe.yaml"],
            "started": "2026-01-02T03:04:05+00:00",
            "clients": {name: {"talk": 30, "sums": 10} for name in names},
        },
        "rounds": lines,
        "finishes": [],
        "selection": {
            name: {"experts": chosen[at].tolist(), "errors": errors[at].tolist(), "calibration_tokens": 4096}
            for at, name in enumerate(names)
        },
        "results": results if finished else {},
        "digest": DIGEST if finished else "",
    }
    return Record(**whole | parts)


def measured_record(clients: int | list[str] = 3, *, layers: int = 2, experts: int = 8, lift: float = 0.0, **parts: Any) -> Record:
    """The same with everything that can be measured, and its cost; `lift` moves the figures, as another seed does.

    Each client's own model is the best on its rows by 0.5; unseen clients lose 0.1 for each row they adapt with.
    """
    record = made_record(clients, layers=layers, experts=experts, **parts)
    rng, names = np.random.default_rng(1), list(record.results)
    found = {
        name: {
            "layers": list(range(layers)),
            "tokens": 100,
            "utilisation": {side: rng.dirichlet(np.ones(experts), layers).tolist() for side in ("base", "personal")},
            "balance": {"base": [0.75] * layers, "personal": [0.5 + lift] * layers},
            "token_entropy": {"base": [0.9] * layers, "personal": [0.8] * layers},
            "agreement": [0.95 - at / 100 for at in range(layers)],
            "drift": [0.01 * (at + 1) + lift for at in range(layers)],
            "graft_layers": list(range(layers)),
            "gate_mean": [[0.25 + lift] for _ in range(layers)],
            "gate_histogram": [[[0.5, 0.25, 0.25, *[0.0] * 7]] for _ in range(layers)],
            "dominates": [0.125] * layers,
        }
        for name in names
    }
    unseen = {
        name: {
            str(count): {model: {"loss": loss + lift} for model, loss in (("base", 4.0), ("personal", 3.0 + at - 0.1 * count))}
            for count in (0, 1, 2)
        }
        for at, name in enumerate(("held-out", "never-met"))
    }
    record.environment.get("clients", {}).update({name: {"talk": 40} for name in unseen})
    cross = {client: {owner: 3.0 if owner == client else 3.5 for owner in names} for client in names}
    told = {model: {"loss": {"interval_rows": [mean - 0.25, mean + 0.25]}} for model, mean in (("base", 3.5), ("personal", 3.0))}
    record.further.update({"summary": told, "experts": found, "unseen": unseen, "cross": cross})
    flops = {"flops_base": 1000, "flops_grafted": 1250, "flops_adapters": 50, "flops_graft": 200}
    account = {"parameters": 9_118_656, "trained": 388_230, "shared": 55_296, "personal": 332_934, **flops}
    halves = [({"loading": 1.0, "selection": 2.0, "training": 3.0}, 1.5e9), ({"loading": 1.5, "training": 6.0, "evaluation": 2.5}, 2e9)]
    sessions = [
        {"rounds": rounds, "finished": rounds == 3, "seconds": seconds, "peak_memory": int(peak), "energy_processors": 1800.0 * rounds}
        for rounds, (seconds, peak) in zip((1, 3), halves, strict=True)
    ]
    record.spending.update({"account": account, "sessions": sessions})
    return record


@pytest.fixture
def make() -> Callable[..., Record]:
    return made_record


@pytest.fixture
def measure() -> Callable[..., Record]:
    return measured_record
