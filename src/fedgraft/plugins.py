"""Names are files: a method, family, criterion or dataset called `x` is the module `x.py` of its folder. No registry."""

from __future__ import annotations

import ast
import difflib
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDERS = {
    "method": "fedgraft.methods",
    "family": "fedgraft.moe.families",
    "criterion": "fedgraft.selection.criteria",
    "dataset": "fedgraft.data.datasets",
    "recorder": "fedgraft.report.recorders",
}
FRAME = frozenset({"method"})  # modules of the folders that are the frame, not plug-ins


def names(kind: str) -> list[str]:
    """Every plug-in of a kind, sorted."""
    folder = importlib.import_module(FOLDERS[kind])
    return sorted(
        entry.name for entry in pkgutil.iter_modules(folder.__path__) if entry.name not in FRAME and not entry.name.startswith("_")
    )


def load(kind: str, name: str) -> ModuleType:
    """The module of that name.

    Raises:
        ValueError: there is no such file; the message names the nearest one and lists the folder.
    """
    known = names(kind)
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}{nearest(name, known)}; there are: {', '.join(known)}")
    return importlib.import_module(f"{FOLDERS[kind]}.{name}")


def describe(kind: str) -> list[dict[str, Any]]:
    """Every plug-in of a kind with the first line of its docstring."""
    return [{"name": name, "supported": True, "reason": first_line(kind, name)} for name in names(kind)]


def first_line(kind: str, name: str) -> str:
    """The first line of a plug-in's docstring, read without importing it."""
    (folder,) = importlib.import_module(FOLDERS[kind]).__path__
    text = ast.get_docstring(ast.parse((Path(folder) / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0] if text else ""


def nearest(name: str, known: list[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
