"""Everything that reads what others have written, and inputs for it: sound ones, damaged ones and forged ones."""

from __future__ import annotations

import functools
import gzip
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fedgraft import files
from fedgraft.aggregation.replies import Due, as_packed, usable
from fedgraft.aggregation.server import Reply
from fedgraft.bundle import HEADER, Bundle
from fedgraft.data.datasets import jsonl
from fedgraft.data.example import SPLITS
from fedgraft.deployment import frames
from fedgraft.deployment.connection import load_connection
from fedgraft.deployment.farewell import Farewell
from fedgraft.deployment.federation import Federation, add_site, create, find
from fedgraft.deployment.site_settings import load_site
from fedgraft.engine.card import Card
from fedgraft.engine.wire import Frame, _sum
from fedgraft.moe.checkpoint import inspect_folder
from fedgraft.recipe import load_recipe, shipped
from fedgraft.report.record import read_document, read_recipe
from fedgraft.report.tail import Tail
from fedgraft.selection.prepared import read_choices
from fedgraft.use.exported import ABOUT, LEAVES, ExportSource
from fedgraft.use.prompts import read_prompts
from tests.fuzz.server import BODIES, REQUESTS, posted, requested
from tests.fuzz.site import guarded, requests

LEAF = "layers.0.attention.q.A"
SHARED = Bundle(trees={"shared": {LEAF: torch.arange(6.0).reshape(2, 3)}}, facts={"examples": 3, "loss": 0.5, "experts": [[1], [0]]})
FIGURES = {"personal": {"loss": 3.5, "gate_mean": [[0.1]], "interval": {"loss": [3.0, 4.0]}}}
CARD = Card(name="ada", rows=dict.fromkeys(SPLITS, 3), categories={"law": 3}, data_digest="d", base_digest="b")
SITE = "name: north\nmodel: {name: demo}\ndata: {dataset: jsonl, path: rows, partition: files}\npolicy: {methods: [flex], rounds: 3}\n"
ROW = {"id": "r1", "prompt": "Q", "response": "A", "category": "law", "split": "train", "choices": ["A", "B"], "metric": "exact_match"}
CHOSEN = {
    **dict.fromkeys(("base", "base_digest", "criterion", "text", "dtype"), "x"),
    "clients": {"ada": {"rows": "d", "experts": [[1], [0]], "errors": [[0.5, 0.1]], "tokens": 3, "mixture": [[[1, 0.5]]]}},
}
CHAT = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
TOKENS = [
    *(bytes([number]) for number in (0, 9, 10, 34, 39, 44, 45, 48, 58, 91, 92, 93, 123, 125, 127, 128, 194, 237, 255)),
    b"[" * 2000,
    b'{"a":' * 2000,
    b"- " * 2000,
    b"9" * 5000,
    b"-1",
    b"0.5",
    b"1e999",
    b"NaN",
    b"-Infinity",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b'"\\ud800"',
    b'"\\u0000"',
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"../../x",
    b"~nobody/x",
    b"\xff" * 8,
    b"\0" * 8,
    b"\xff\xff\xff\x7f\0\0\0\0",
    b"!!python/object/apply:os.system [id]",
    b"!!int x",
    b"!!bool x",
    b"!!timestamp x",
    b"!!binary x",
    b"!!float ''",
    b"!!set {a}",
    b"2001-02-30",
    b"&a [*a]",
    b"<<: *a",
    b"? [a]: b",
    b"0x",
    b"1:99:99",
    b"F8_E4M3",
    b"I64",
    b"BOOL",
]


class _Replayed:
    """A connection from which only these bytes come."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def settimeout(self, seconds: float | None) -> None: ...

    def recv_into(self, place: memoryview, most: int) -> int:
        part, self.content = self.content[:most], self.content[most:]
        place[: len(part)] = part
        return len(part)


@functools.cache
def folder() -> Path:
    """Where files are written; in memory where the system has such a place."""
    place = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fedgraft-fuzz-", dir=place if place.is_dir() else None))


def written(name: str, content: bytes) -> Path:
    """A file with this content."""
    path = folder() / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content)
    return path


def of_file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """Reads what a file of this name would hold."""
    return lambda content: read(written(name, content))


def both(content: bytes) -> None:
    """The codec's two ways to look at a bundle."""
    try:
        Bundle.outline(content)
    finally:
        Bundle.decode(content)


def headed(content: bytes) -> None:
    """A bundle with this header, whose lengths and checksums fit, so that what they guard is read."""
    head, _, inner = content.partition(b"\n")
    try:
        places = json.loads(head)
        places["__metadata__"] = {HEADER: inner.decode()}
        head = json.dumps(places).encode()
    except (ValueError, TypeError, RecursionError):
        pass
    both(len(head).to_bytes(8, "little") + head + b"\1" * 24)


def framed(content: bytes) -> None:
    """A frame with this head, whose length and checksum fit."""
    text = content.decode(errors="replace")
    head = json.dumps({"sum": _sum(text), "head": text}).encode()
    Frame.decode(len(head).to_bytes(8, "little") + head)


def received(content: bytes) -> None:
    """A frame between a worker and its node."""
    connection: Any = _Replayed(content)
    _, length = frames.receive_header(connection)
    frames.receive_body(connection, length, 1000)


def replied(content: bytes) -> None:
    """A reply with these facts, at the coordinator; its leaves are sound."""
    facts = files.parse_json(content)
    if not isinstance(facts, dict):
        return
    replies = [Reply(client="ada", bundle=Bundle(trees=SHARED.trees, facts=facts))]
    due = Due(leaves=as_packed, facts=("examples",))
    assert len(list(usable(iter(replies), {"ada": SHARED}, due, {}, lambda client, reason: None))) <= 1


def exported(content: bytes) -> None:
    """An export's own file."""
    written(f"export/{LEAVES}", SHARED.encode())
    ExportSource(written(f"export/{ABOUT}", content).parent)


def checkpoint(content: bytes) -> None:
    """The weights of a base."""
    for name in ("config.json", "tokenizer.json"):
        written(f"base/{name}", b"{}")
    inspect_folder(written("base/model.safetensors", content).parent)


def indexed(content: bytes) -> None:
    """The index of a base's shards."""
    for name in ("config.json", "tokenizer.json"):
        written(f"sharded/{name}", b"{}")
    inspect_folder(written("sharded/model.safetensors.index.json", content).parent)


@functools.cache
def federation(place: Path) -> Federation:
    """With keys and one site."""
    made = create(place / "leaving", ["127.0.0.1"], port=9092, listen="127.0.0.1", insecure=False)
    add_site(made, "north")
    return made


def said(content: bytes) -> None:
    """What anybody who reaches the coordinator's port can say at the door where sites leave."""
    door = Farewell(federation(folder()))
    assert door.hear(content.replace(b"CHALLENGE", door.hear(b"")[1].encode()))[0] in {200, 400, 403}


def rows(content: bytes) -> None:
    """Training rows, packed."""
    rows_of(written("rows.jsonl.gz", gzip.compress(content, 0)))


def rows_of(path: Path) -> None:
    """Training rows and, of the same file, prompts."""
    try:
        jsonl.load("train", str(path))
    finally:
        read_prompts(path)


def lines(path: Path) -> None:
    """The record's lines, as a run and as an onlooker reads them."""
    Tail(path).look()
    files.read_lines(path)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One reader; whatever it is given, it returns or raises `ValueError` or `OSError`."""

    read: Callable[[bytes], Any]
    seeds: tuple[bytes, ...]
    """Sound inputs."""
    many: int
    """Inputs of the long run: a million, or about a quarter of an hour's worth."""


def _json(*values: Any) -> tuple[bytes, ...]:
    return tuple(json.dumps(value).encode() for value in values)


def _frames() -> tuple[bytes, ...]:
    head = json.dumps({"kind": "question", "token": "t"}).encode()
    return (frames.PREFIX.pack(frames.MAGIC, len(head), 4) + head + b"body",)


def _header() -> bytes:
    content = SHARED.encode()
    size = int.from_bytes(content[:8], "little")
    places = json.loads(content[8 : 8 + size])
    inner = json.loads(places.pop("__metadata__")[HEADER])
    inner.pop("sum")  # one without it is read as one from before there were checksums
    return json.dumps(places).encode() + b"\n" + json.dumps(inner).encode()


MILLION = 1_000_000
ASKED = Frame(kind="ask", facts={"run": "r1", "recipe": {"seed": 1}, "clients": ["ada"], "asked": 1, "committed": 0}, content=b"content")
FEDERATION = b"hosts: [localhost]\nport: 9092\nlisten: 127.0.0.1\ninsecure: true\n"
WHOLE = {
    "method": {"name": "flex"},
    "federation": {"merge": {"rule": "krum"}, "join": {"ada": 1}},
    "compression": {"name": "top_k"},
    "attack": {"name": "scale", "clients": ["ada"]},
}
RECIPES = ((shipped() / "demo.yaml").read_bytes(), yaml.safe_dump(load_recipe(WHOLE).complete()).encode())
RUN = b"schema: 1\nfederation: {rounds: 3}\nmethod: {name: flex}\nseed: 0\n"
READERS: dict[str, Reader] = {
    "bundle": Reader(read=both, seeds=(SHARED.encode(), Bundle().encode()), many=MILLION),
    "bundle, checksum fits": Reader(read=headed, seeds=(_header(),), many=MILLION),
    "message": Reader(read=Frame.decode, seeds=(ASKED.encode(),), many=MILLION),
    "message, checksum fits": Reader(
        read=framed, seeds=_json({"schema": 1, "kind": "ask", "facts": ASKED.facts, "bytes": 0}), many=MILLION
    ),
    "worker's frame": Reader(read=received, seeds=_frames(), many=MILLION),
    "farewell": Reader(
        read=said,
        seeds=_json(
            {"site": "north", "challenge": "CHALLENGE", "signature": "abcd"}, {"site": "x", "challenge": "0.ab.cd", "signature": ""}
        ),
        many=200_000,
    ),
    "card": Reader(read=lambda content: Card.of(files.parse_json(content)), seeds=_json(CARD.as_facts()), many=MILLION),
    "reply's facts": Reader(
        read=replied, seeds=_json({**SHARED.facts, "models": FIGURES}, {"examples": 2, "unseen": {"0": FIGURES}}), many=MILLION
    ),
    "recipe": Reader(read=of_file("recipe.yaml", lambda path: load_recipe(path).absolute()), seeds=RECIPES, many=20_000),
    "site.yaml": Reader(read=of_file("site.yaml", load_site), seeds=(SITE.encode(),), many=20_000),
    "coordinator.yaml": Reader(
        read=of_file("coordinator.yaml", load_connection), seeds=(b"address: localhost:9092\ninsecure: true\n",), many=20_000
    ),
    "federation.yaml": Reader(read=of_file("federation/federation.yaml", lambda path: find(path.parent)), seeds=(FEDERATION,), many=20_000),
    "run's recipe.yaml": Reader(read=of_file("run.yaml", read_recipe), seeds=(RUN,), many=20_000),
    "run's documents": Reader(read=of_file("x.json", read_document), seeds=_json({"schema": 1, "clients": {"ada": {}}}), many=MILLION),
    "choices made before a run": Reader(read=of_file("choices.json", read_choices), seeds=_json({"schema": 1, **CHOSEN}), many=MILLION),
    "rounds.jsonl": Reader(
        read=of_file("rounds.jsonl", lines), seeds=(b'{"round": 0, "loss": 1.5}\n{"round": 1, "failed": {"bo": "x"}}\n',), many=MILLION
    ),
    "rows": Reader(read=of_file("rows.jsonl", rows_of), seeds=tuple(b"\n".join(_json(ROW, CHAT)) + b"\n" for _ in range(1)), many=MILLION),
    "rows, packed": Reader(read=rows, seeds=(b"\n".join(_json(CHAT, ROW)) + b"\n",), many=MILLION),
    "gzip": Reader(read=of_file("x.jsonl.gz", rows_of), seeds=(gzip.compress(json.dumps(ROW).encode(), mtime=0),), many=MILLION),
    "prompts": Reader(read=of_file("prompts.txt", read_prompts), seeds=("Grüße\nQ\n".encode(),), many=MILLION),
    "export": Reader(
        read=exported,
        seeds=_json({"schema": 1, "name": "ada", "base_digest": "b", "about": {"client": "ada"}, "recipe": {"seed": 1}}),
        many=200_000,
    ),
    "HTTP request": Reader(read=requested, seeds=REQUESTS, many=500_000),
    "HTTP body": Reader(read=posted, seeds=BODIES, many=200_000),
    "coordinator's request": Reader(read=lambda content: guarded(folder(), content), seeds=requests(), many=200_000),
    "base's weights": Reader(read=checkpoint, seeds=(SHARED.encode(),), many=200_000),
    "base's index": Reader(read=indexed, seeds=_json({"weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}), many=200_000),
}


def damaged(rng: random.Random, seeds: tuple[bytes, ...]) -> bytes:
    """A sound input after one to six changes: bits, spans cut out or repeated, tokens that mean something somewhere, two inputs joined."""
    content = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(content) + 1)
        to = min(len(content), at + rng.choice((1, 1, 2, 4, 8, 16, 64)))
        match rng.randrange(7):
            case 0 if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                del content[at:to]
            case 2:
                content[at:at] = content[at:to] * rng.choice((1, 2, 50))
            case 3:
                content[at:at] = rng.choice(TOKENS)
            case 4:
                content[at:to] = rng.choice(TOKENS)
            case 5:
                content = content[:at] + rng.choice(seeds)[rng.randrange(len(seeds[0]) + 1) :]
            case _:
                _swap_value(rng, content)
    return bytes(content)


def _swap_value(rng: random.Random, content: bytearray) -> None:
    """Another value in the place of one that ends a pair, so that the rest stays well-formed."""
    colons = [index for index, letter in enumerate(content) if letter == ord(":")]
    if not colons:
        return
    start = rng.choice(colons) + 1
    end = next((index for index in range(start, len(content)) if content[index] in b",}\n"), len(content))
    content[start:end] = b" " + rng.choice(TOKENS)
