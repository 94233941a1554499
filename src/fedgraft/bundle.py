"""Bundle: named trees and flat facts, all that crosses wire, disk and memory, through one codec (safetensors with a JSON header)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from safetensors.torch import load as decode_tensors
from safetensors.torch import save as encode_tensors

from fedgraft import files
from fedgraft.tree import Tree, digest, digest_of_digests

SCHEMA = 1
HEADER = "fedgraft"
HEADER_BYTES = 1 << 26
"""Longest header that is parsed: some 400,000 leaves."""
Fact: TypeAlias = str | int | float | bool | None | list[Any] | dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What a bundle holds, without its numbers."""

    trees: dict[str, dict[str, int]]
    """Bytes of each leaf, by tree and address."""
    facts: dict[str, Fact]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Trees by name and JSON facts by name. Names of trees contain no `/`."""

    trees: dict[str, Tree] = field(default_factory=dict)
    facts: dict[str, Fact] = field(default_factory=dict)

    def tree(self, name: str) -> Tree:
        """The tree of that name, empty when there is none."""
        return self.trees.get(name, {})

    def digest(self) -> str:
        """Digest of the trees (facts such as timings don't count)."""
        return digest_of_digests(f"{name} {digest(tree)}" for name, tree in sorted(self.trees.items()) if tree)

    def encode(self) -> bytes:
        """The bytes that travel and are stored, a function of the bundle alone."""
        # cloned, since safetensors refuses tensors that share memory, as two trees of one bundle may
        copies = {f"{name}/{key}": leaf.detach().clone().cpu() for name, tree in self.trees.items() for key, leaf in tree.items()}
        leaves = {path: leaf.contiguous() for path, leaf in copies.items()}
        header: dict[str, Any] = {"schema": SCHEMA, "facts": self.facts, "trees": sorted(self.trees)}
        header["sum"] = _sum(header, leaves)
        return encode_tensors(leaves, metadata={HEADER: json.dumps(header)})  # one key, since safetensors orders several at random

    @staticmethod
    def decode(content: bytes, source: str = "message") -> Bundle:
        """The inverse of `encode`.

        Raises:
            ValueError: damaged content or a newer schema; the message names `source`.
        """
        try:
            places, _ = _places(content)
            header = files.parse_json(places["__metadata__"][HEADER])
            schema, facts, trees = int(header["schema"]), dict[str, Fact](), dict[str, Tree]()
            if schema <= SCHEMA:
                facts, trees = _facts(header), {name: {} for name in _names(header)}
                leaves = decode_tensors(content)
                if header.pop("sum", None) not in {None, _sum(header, leaves)}:
                    raise ValueError("its checksum does not fit")
                for path, leaf in leaves.items():
                    name, key = path.split("/", 1)
                    trees[name][key] = leaf
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{source}: damaged or not written by fedgraft ({why}); restore it from a copy, or start a new run") from error
        if schema > SCHEMA:
            raise ValueError(f"{source}: written by a newer fedgraft (schema {schema}, this one reads up to {SCHEMA}); upgrade fedgraft")
        return Bundle(trees=trees, facts=facts)

    @staticmethod
    def outline(content: bytes, source: str = "message") -> Outline:
        """What encoded content holds, by its own header, which is checked to account for every byte.

        Raises:
            ValueError: damaged, or bytes or texts beside those of leaves and facts; the message names `source`.
        """
        try:
            places, size = _places(content)
            texts = places.pop("__metadata__")
            header = files.parse_json(texts.pop(HEADER))
            spans = {path: place["data_offsets"] for path, place in places.items()}
            facts, trees = _facts(header), {name: dict[str, int]() for name in _names(header)}
            for path, (start, end) in spans.items():
                name, key = path.split("/", 1)
                trees[name][key] = end - start
            ends = [0, *(end for _, end in sorted(spans.values()))]
            whole = [start for start, _ in sorted(spans.values())] == ends[:-1] and ends[-1] == len(content) - 8 - size
            if texts or header.keys() - {"schema", "facts", "trees", "sum"} or not whole:
                raise ValueError("it holds more than trees and facts")
        except Exception as error:
            raise ValueError(f"{source}: damaged or not written by fedgraft ({type(error).__name__}: {error})") from error
        return Outline(trees=trees, facts=facts)

    def save(self, path: Path) -> None:
        """Write to disk, atomically."""
        files.write_bytes(path, self.encode())

    @staticmethod
    def load(path: Path) -> Bundle:
        """Read from disk.

        Raises:
            ValueError: as `decode`, naming the file.
        """
        return Bundle.decode(path.read_bytes(), str(path))


def _places(content: bytes) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and its length, which is compared with a limit first.

    Raises:
        ValueError: too long, or no JSON.
    """
    size = int.from_bytes(content[:8], "little")
    if size > HEADER_BYTES:
        raise ValueError(f"a header of {size} bytes, at most {HEADER_BYTES} are read")
    places: dict[str, Any] = files.parse_json(content[8 : 8 + size])
    return places, size


def _facts(header: Mapping[str, Any]) -> dict[str, Fact]:
    if not isinstance(header.get("facts", {}), dict):
        raise ValueError("its facts have no names")
    return dict(header.get("facts", {}))


def _names(header: Mapping[str, Any]) -> list[str]:
    """Of the trees."""
    if not isinstance(header["trees"], list) or not all(isinstance(name, str) for name in header["trees"]):
        raise ValueError("its trees have no names")
    return header["trees"]


def _sum(header: Mapping[str, Any], leaves: Tree) -> str:
    """Checksum of all content, by which a flipped bit is found; files from before it was written have none."""
    return hashlib.sha256(f"{json.dumps(header)}\n{digest(leaves)}".encode()).hexdigest()
