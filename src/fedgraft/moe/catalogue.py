"""Which MoE architectures of the installed transformers the general rule covers, read from its source files without importing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fedgraft import plugins
from fedgraft.moe.family import PROVEN


def families() -> list[dict[str, Any]]:
    """Name, supported and reason of every architecture whose experts follow the contract; supported means: proven by the test suite."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    own = set(plugins.names("family"))
    rows = []
    for path in sorted((Path(spec.origin).parent / "models").glob("*/modeling_*.py")):
        if "use_experts_implementation" not in path.read_text(encoding="utf-8") or path.stem.startswith(("modeling_tf", "modeling_flax")):
            continue
        name = path.stem.removeprefix("modeling_")
        proven = name in PROVEN or name in own
        reason = (
            "extraction, gating and selection proven exact"
            if proven
            else "follows the experts contract; not proven here, checked when loaded"
        )
        rows.append({"name": name, "supported": proven, "reason": reason})
    return rows
