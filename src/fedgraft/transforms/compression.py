"""Compression of what clients send: the change of each shared leaf against what the client was sent, in fewer bytes.

The client codes trained - received; the coordinator, which knows what it sent, adds the decoded change to that again, in float64. What
`int8` and `top_k` leave out stays in the client's memory and is added to its next change (error feedback; Seide et al. 2014, Karimireddy et
al. 2019), so that all that was sent is the sum of all true changes but for the last error. Packages to clients travel in fp32 as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from fedgraft.address import everything
from fedgraft.aggregation.replies import as_packed
from fedgraft.aggregation.server import Reply
from fedgraft.bundle import Bundle
from fedgraft.methods.method import Method, absorb_updates
from fedgraft.settings import Section
from fedgraft.training.client import Client
from fedgraft.tree import Tree, subtract
from fedgraft.words import size

ERROR = "compression.error"
"""The tree of a client's memory that holds what it has not sent yet, in float64."""
Question: TypeAlias = Callable[[Client, Bundle], Bundle]


class NoCompression(Section):
    """Leaves travel in fp32, as they are."""

    name: Literal["none"] = "none"
    """`none`, or what clients send the changes of shared leaves as: `bf16` and `fp16` halve the bytes (fp16 loses changes below 6e-8),
    `int8` takes a quarter, with one scale for each leaf, `top_k` sends the largest numbers alone."""


class _Coded(Section):
    """A way to write a change: leaf -> parts by name (`""` stands for the address itself) and back."""

    parts: ClassVar[Mapping[str, torch.dtype]]

    @property
    def feedback(self) -> bool:
        """What was left out is added to the next change."""
        return False

    def code(self, change: Tensor) -> dict[str, Tensor]:
        """The parts of a float64 leaf."""
        raise NotImplementedError

    def sizes(self, numel: int) -> dict[str, int]:
        """Entries of each part of a leaf of so many."""
        return dict.fromkeys(self.parts, numel)

    def decode(self, parts: Mapping[str, Tensor], numel: int) -> Tensor:
        """The change as a flat float64 leaf, from parts of the right types and sizes.

        Raises:
            ValueError: they make no leaf.
        """
        return parts[""].double()

    def bytes_of(self, numel: int) -> int:
        """Bytes of a leaf on the wire."""
        return sum(entries * self.parts[name].itemsize for name, entries in self.sizes(numel).items())


class Bf16(_Coded):
    """Each number of a change rounded to bfloat16."""

    name: Literal["bf16"] = "bf16"
    parts: ClassVar[Mapping[str, torch.dtype]] = {"": torch.bfloat16}

    def code(self, change: Tensor) -> dict[str, Tensor]:
        """Rounded once more, from fp32."""
        return {"": change.float().bfloat16()}


class Fp16(_Coded):
    """Each number of a change rounded to half precision; one beyond 65504 makes the reply a lost one."""

    name: Literal["fp16"] = "fp16"
    parts: ClassVar[Mapping[str, torch.dtype]] = {"": torch.float16}

    def code(self, change: Tensor) -> dict[str, Tensor]:
        """Rounded."""
        return {"": change.half()}


class Int8(_Coded):
    """Each number of a change as one of 255 multiples of a scale, the leaf's largest number / 127."""

    name: Literal["int8"] = "int8"
    error_feedback: bool = True
    """What rounding left out is added to the client's next change; 8 bytes a number in its memory."""
    parts: ClassVar[Mapping[str, torch.dtype]] = {"": torch.int8, "scale": torch.float32}

    @property
    def feedback(self) -> bool:
        """As set."""
        return self.error_feedback

    def sizes(self, numel: int) -> dict[str, int]:
        """One scale."""
        return {"": numel, "scale": 1}

    def code(self, change: Tensor) -> dict[str, Tensor]:
        """Rounded to the nearest multiple; a leaf of zeros has scale 0."""
        scale = (change.abs().max() / 127).float() if change.numel() else torch.zeros(())
        steps = (change / scale.double()).round().clamp(-127, 127) if scale > 0 else torch.zeros_like(change)
        return {"": steps.to(torch.int8), "scale": scale.reshape(1)}

    def decode(self, parts: Mapping[str, Tensor], numel: int) -> Tensor:
        """Multiples times scale."""
        return parts[""].double() * parts["scale"].double()


class TopK(_Coded):
    """The numbers of a leaf that change most, in fp32, and their places (Aji and Heafield 2017)."""

    name: Literal["top_k"] = "top_k"
    share: float = Field(default=0.1, gt=0, le=1)
    """Share of each leaf's numbers that is sent, rounded up; each costs 8 bytes."""
    error_feedback: bool = True
    """What was not sent is added to the client's next change; 8 bytes a number in its memory."""
    parts: ClassVar[Mapping[str, torch.dtype]] = {"": torch.float32, "index": torch.int32}

    @property
    def feedback(self) -> bool:
        """As set."""
        return self.error_feedback

    def sizes(self, numel: int) -> dict[str, int]:
        """As many numbers as places."""
        return dict.fromkeys(self.parts, math.ceil(self.share * numel))

    def code(self, change: Tensor) -> dict[str, Tensor]:
        """Ties go to the first; places ascend."""
        order = change.abs().argsort(descending=True, stable=True)[: self.sizes(change.numel())[""]]
        index = order.sort().values
        return {"": change[index].float(), "index": index.to(torch.int32)}

    def decode(self, parts: Mapping[str, Tensor], numel: int) -> Tensor:
        """Zero elsewhere."""
        index = parts["index"].long()
        if index.numel() and (index[0] < 0 or index[-1] >= numel or (index.diff() <= 0).any()):
            raise ValueError(f"its places do not ascend within the {numel} numbers of the leaf")
        return torch.zeros(numel, dtype=torch.float64).scatter(0, index, parts[""].double())


CompressionSettings: TypeAlias = Annotated[NoCompression | Bf16 | Fp16 | Int8 | TopK, Field(discriminator="name")]


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


def summary_lines(settings: CompressionSettings, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, str]]:
    """What a reply shrinks to, for the screen before training; nothing where it doesn't."""
    if isinstance(settings, NoCompression):
        return []
    return [("", f"sent up as {settings.name}: {size(sum(settings.bytes_of(math.prod(shape)) for shape in shapes.values()))}")]


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
            whole = (leaf + before[key] if key in before else leaf).flatten()
            parts = settings.code(whole)
            for part, coded in parts.items():
                trees[_tree(part)][key] = coded
            errors[key] = (whole - settings.decode(parts, whole.numel())).reshape(leaf.shape)
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


def _restore(settings: _Coded, reply: Bundle, sent: Tree) -> Tree:
    """What was sent + the decoded change.

    Raises:
        ValueError: a leaf was not sent, or its parts have other types or sizes than a leaf of that shape has.
    """
    whole: Tree = {}
    for key in sorted(set().union(*(reply.tree(_tree(part)) for part in settings.parts))):
        if key not in sent:
            raise ValueError(f"leaf {key!r} is there and was not asked for")
        parts, numel = {}, sent[key].numel()
        for part, entries in settings.sizes(numel).items():
            coded = reply.tree(_tree(part)).get(key)
            if coded is None or coded.dtype != settings.parts[part] or tuple(coded.shape) != (entries,):
                got = "nothing" if coded is None else f"{coded.dtype} {tuple(coded.shape)}"
                raise ValueError(f"leaf {key!r} of {_tree(part)!r}: got {got} in place of {settings.parts[part]} {(entries,)}")
            parts[part] = coded
        try:
            whole[key] = sent[key].double() + settings.decode(parts, numel).reshape(sent[key].shape)
        except ValueError as error:
            raise ValueError(f"leaf {key!r}: {error}") from None
    return whole


def _tree(part: str) -> str:
    return f"shared.{part}" if part else "shared"
