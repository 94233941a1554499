"""`results.json`, where every benchmark leaves its figures under its own names."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedgraft import files

PATH = Path(__file__).with_name("results.json")


def entry(name: str, ratios: Sequence[float], unit: str, **figures: Any) -> dict[str, Any]:
    """One result: the median of `ratios`, their range, and the absolute `figures` behind them."""
    return {
        "name": name,
        "ratio": round(statistics.median(ratios), 4),
        "median": round(statistics.median(ratios), 4),
        "min": round(min(ratios), 4),
        "max": round(max(ratios), 4),
        "unit": unit,
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "figures": figures,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}",
        "date": datetime.now(UTC).date().isoformat(),
    }


def read() -> list[dict[str, Any]]:
    """All results so far, by name."""
    return list(json.loads(PATH.read_text(encoding="utf-8"))) if PATH.exists() else []


def write(entries: Sequence[dict[str, Any]]) -> None:
    """Add the entries, in place of older ones of the same name; atomic."""
    merged = {item["name"]: item for item in [*read(), *entries]}
    files.write_json(PATH, [merged[name] for name in sorted(merged)])
