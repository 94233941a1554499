"""API keys: who may ask which models, so that one site can't read another's."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from fedgraft.deployment.keys import write_private
from fedgraft.report.record import read_document
from fedgraft.use.source import BASE, SHARED

EVERYTHING, OPERATOR = "*", "operator"
SCHEMA = 1


class Ring:
    """The keys of a server."""

    def __init__(self, allowed: dict[str, frozenset[str]], operators: frozenset[str]) -> None:
        """Keys -> models, and the keys that may also read the metrics."""
        self._allowed = {_digest(key): models for key, models in allowed.items()}
        self._operators = {_digest(key) for key in operators}

    def models(self, key: str) -> frozenset[str] | None:
        """The models that the key opens; None: there is no such key. Keys are compared by their digests, so timing tells nothing."""
        return self._allowed.get(_digest(key))

    def operates(self, key: str) -> bool:
        """Whether it is an operator's key."""
        return _digest(key) in self._operators


def make_keys(path: Path, models: Sequence[str]) -> None:
    """Write one key for every client, for its own model, `shared` and `base`, and the operator's for all of them; mode 0600.

    Raises:
        ValueError: the file exists.
    """
    common = [name for name in models if name in {BASE, SHARED}]
    clients = [name for name in models if name not in common]
    entries = [{"name": OPERATOR, "key": _fresh(), "models": [EVERYTHING]}]
    entries += [{"name": name, "key": _fresh(), "models": [name, *common]} for name in clients]
    content = json.dumps({"schema": SCHEMA, "keys": entries}, indent=2, ensure_ascii=False) + "\n"
    write_private(path, content.encode())


def read_keys(path: Path, models: Sequence[str]) -> Ring:
    """The keys of a file.

    Raises:
        ValueError: no such file, one that others can read, a damaged one, or a key for a model that is not served.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; make one with: fedgraft serve RUN --make-keys {path}")
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise ValueError(f"{path}: others on this machine can read these keys; change that with: chmod 600 {path}")
    allowed: dict[str, frozenset[str]] = {}
    operators = set()
    entries = read_document(path).get("keys")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: no list of keys under 'keys'")
    for number, entry in enumerate(entries):
        where = f"{path}: keys[{number}]"
        key, names = (entry.get("key"), entry.get("models")) if isinstance(entry, dict) else (None, None)
        if not isinstance(key, str) or len(key) < 16 or not isinstance(names, list):
            raise ValueError(f"{where}: needs a key of at least 16 characters and a list of models")
        if key in allowed:
            raise ValueError(f"{where}: its key stands in the file twice")
        unknown = [name for name in names if name not in {EVERYTHING, *models}]
        if unknown:
            raise ValueError(f"{where}: no model {unknown[0]!r} is served; models: {', '.join(models)}")
        allowed[key] = frozenset(models if EVERYTHING in names else names)
        if EVERYTHING in names:
            operators.add(key)
    return Ring(allowed, frozenset(operators))


def _fresh() -> str:
    return f"fg-{secrets.token_urlsafe(32)}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
