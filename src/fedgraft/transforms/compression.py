"""Compression of what clients send: the change of each shared leaf against what the client was sent, in fewer bytes.

The client codes trained - received, by one of `codings` or by `low_rank`; the coordinator, which knows what it sent, adds the decoded
change to that again, in float64. What `int8`, `top_k` and `low_rank` leave out stays in the client's memory and is added to its next
change (error feedback; Seide et al. 2014, Karimireddy et al. 2019), so that all that was sent is the sum of all true changes but for the
last error. Packages to clients travel in fp32 as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from fedgraft.address import everything
from fedgraft.aggregation.replies import as_packed
from fedgraft.aggregation.server import Reply
from fedgraft.bundle import Bundle
from fedgraft.methods.method import Method, absorb_updates
from fedgraft.settings import Section
from fedgraft.training.client import Client
from fedgraft.transforms.codings import Bf16, Coding, Fp16, Int8, Shape, TopK
from fedgraft.transforms.low_rank import LowRank
from fedgraft.tree import Tree, subtract
from fedgraft.words import size

ERROR = "compression.error"
"""The tree of a client's memory that holds what it has not sent yet, in float64."""
Question: TypeAlias = Callable[[Client, Bundle], Bundle]


class NoCompression(Section):
    """Leaves travel in fp32, as they are."""

    name: Literal["none"] = "none"
    """`none`, or what clients send the changes of shared leaves as: `bf16` and `fp16` halve the bytes (fp16 loses changes below 6e-8),
    `int8` takes a quarter, with one scale for each leaf, `top_k` sends the largest numbers alone,
    `low_rank` the product of two thin matrices that is nearest to each one's change."""


CompressionSettings: TypeAlias = Annotated[NoCompression | Bf16 | Fp16 | Int8 | TopK | LowRank, Field(discriminator="name")]


def check_compression(settings: CompressionSettings, method: Method, name: str) -> None:
    """Refuse what the method cannot bear.

    Raises:
        ValueError: it can't; says why.
    """
    if isinstance(settings, NoCompression):
        return
    why = ""
    if method.pooled or method.personal is everything:
        why = "sends no leaves"
    elif method.absorb is not absorb_updates or method.sent is not as_packed:
        why = "sends something else than new values of the leaves that it was sent, or merges whole factors"
    if why:
        raise ValueError(f"compression.name: {settings.name!r} codes changes of shared leaves, and method {name!r} {why}; set it to none")


def summary_lines(settings: CompressionSettings, shapes: Mapping[str, Shape]) -> list[tuple[str, str]]:
    """What a reply shrinks to, for the screen before training; nothing without compression."""
    if isinstance(settings, NoCompression):
        return []
    coded, plain = sum(map(settings.bytes_of, shapes.values())), sum(4 * math.prod(shape) for shape in shapes.values())
    return [("", f"sent up as {settings.name}: {size(coded)}{'' if coded < plain else ', which saves nothing'}")]


def widening(settings: CompressionSettings) -> int:
    """Bytes of a reply's leaves at the coordinator, where a change is added in float64, for each byte that they have in fp32."""
    return 1 if isinstance(settings, NoCompression) else 2


def compressed(settings: CompressionSettings, question: Question) -> Question:
    """The client's half: `question` with a coded reply."""
    if isinstance(settings, NoCompression):
        return question

    def asked(client: Client, package: Bundle) -> Bundle:
        before = client.memory.tree(ERROR)
        reply = question(client, package)
        changes = subtract(reply.tree("shared"), package.tree("shared"))
        trees: dict[str, Tree] = {_tree(part): {} for part in settings.parts}
        errors: Tree = {}
        for key, leaf in changes.items():
            whole = leaf + before[key] if key in before else leaf
            parts = settings.code(whole)
            for part, coded in parts.items():
                trees[_tree(part)][key] = coded
            errors[key] = whole - settings.decode(parts, tuple(leaf.shape))
        if settings.feedback:
            client.remember(trees={ERROR: errors})
        return Bundle(trees={**reply.trees, **trees}, facts=reply.facts)

    return asked


def restored(
    settings: CompressionSettings, replies: Iterator[Reply], packages: Mapping[str, Bundle], lost: Callable[[str, str], None]
) -> Iterator[Reply]:
    """The coordinator's half: replies with whole leaves, in float64; `lost` hears of those that cannot be decoded."""
    for reply in replies:
        if isinstance(settings, NoCompression):
            yield reply
            continue
        try:
            shared = _restore(settings, reply.bundle, packages[reply.client].tree("shared"))
        except ValueError as error:
            lost(reply.client, f"the reply of client {reply.client!r} can't be used: {error}")
            continue
        others = {name: tree for name, tree in reply.bundle.trees.items() if name not in map(_tree, settings.parts)}
        yield Reply(client=reply.client, bundle=Bundle(trees={**others, "shared": shared}, facts=reply.bundle.facts))


def _restore(settings: Coding, reply: Bundle, sent: Tree) -> Tree:
    """What was sent + the decoded change.

    Raises:
        ValueError: a leaf was not sent, or its parts are others than a leaf of that shape has, or have other types or shapes.
    """
    whole: Tree = {}
    for key in sorted(set().union(*(reply.tree(_tree(part)) for part in settings.parts))):
        if key not in sent:
            raise ValueError(f"leaf {key!r} is there and was not asked for")
        shape = tuple(sent[key].shape)
        parts, due = {}, settings.shapes(shape)
        for part, dtype in settings.parts.items():
            coded = reply.tree(_tree(part)).get(key)
            got = "nothing" if coded is None else f"{coded.dtype} {tuple(coded.shape)}"
            want = f"{dtype} {due[part]}" if part in due else "nothing"
            if got != want:
                raise ValueError(f"leaf {key!r} of {_tree(part)!r}: got {got} in place of {want}")
            if coded is not None:
                parts[part] = coded
        try:
            whole[key] = sent[key].double() + settings.decode(parts, shape)
        except ValueError as error:
            raise ValueError(f"leaf {key!r}: {error}") from None
    return whole


def _tree(part: str) -> str:
    return f"shared.{part}" if part else "shared"
