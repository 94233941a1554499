"""Which MoE architectures of the installed transformers are supported, read from source files without importing any of them."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

from fedgraft import plugins

CONTRACT = "use_experts_implementation"
UNSUPPORTED = "Not supported: "
"""How the docstring of a family's file begins when it is there to say why not."""
CLASS = re.compile(r"^class (\w+)\(", re.MULTILINE)


def families() -> list[dict[str, Any]]:
    """Name, supported and reason of every architecture (`model_type`) that follows the experts contract or has a file of its own.

    Architectures without a causal language model are listed too, as not supported.
    """
    models = _models_folder()
    sources = {path.parent.name: text for path in sorted(models.glob("*/modeling_*.py")) if CONTRACT in (text := path.read_text("utf-8"))}
    places = {name: folder for folder, text in sources.items() for name in CLASS.findall(text)}
    causal = _causal_classes(models)
    own = plugins.names("family")
    names = {name for name, architecture in causal.items() if architecture in places or _own_file(name, own)}
    rows = [_row(name, own) for name in names]
    without = sources.keys() - {places[causal[name]] for name in names if causal[name] in places}
    rows += [{"name": folder, "supported": False, "reason": "no causal language model in transformers"} for folder in without]
    return sorted(rows, key=lambda row: str(row["name"]))


def _row(name: str, own: list[str]) -> dict[str, Any]:
    file = _own_file(name, own)
    if file is None:
        return {"name": name, "supported": True, "reason": "experts contract of transformers"}
    line = plugins.first_line("family", file)
    return {"name": name, "supported": not line.startswith(UNSUPPORTED), "reason": line.removeprefix(UNSUPPORTED)}


def _own_file(name: str, own: list[str]) -> str | None:
    return next((file for file in (name, name.removesuffix("_text")) if file in own), None)


def _models_folder() -> Path:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "models"


def _causal_classes(models: Path) -> dict[str, str]:
    """model_type -> class of its causal language model, from transformers' own table."""
    tree = ast.parse((models / "auto" / "modeling_auto.py").read_text("utf-8"))
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
            and isinstance(node.value, ast.Call)
        ):
            return {name: str(found) for name, found in ast.literal_eval(node.value.args[0])}
    return {}
