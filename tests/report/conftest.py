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


@pytest.fixture
def make() -> Callable[..., Record]:
    return made_record
