"""What a reply must hold to be folded. One that lacks a leaf, or has another than was due, is lost by name and the round goes on."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import torch
from annotated_types import Len
from pydantic import NonNegativeInt, TypeAdapter, ValidationError

from fedgraft.address import is_residual
from fedgraft.aggregation.server import Reply
from fedgraft.bundle import Bundle
from fedgraft.grafts.lora import Shapes
from fedgraft.tree import Tree, subtract

Form: TypeAlias = Callable[[Shapes, Bundle, Bundle], Mapping[str, Shapes]]
"""(all leaves that the method shares in this model, the package, the reply) -> what leaves the reply must hold, by tree, and no others."""

MOST = sys.float_info.max
LEAST = {"examples": 1, "loss": -MOST, "tokens": 0, "seconds": 0, "truncated": 0, "calibration_tokens": 0}
"""Facts that are numbers, by which replies are weighed and summed up, and the least that each can be."""

Interval: TypeAlias = Annotated[list[float], Len(2, 2)]
Figures: TypeAlias = dict[str, float | dict[str, Interval] | list[list[float]]]
FORMS: Mapping[str, TypeAdapter[Any]] = {
    "experts": TypeAdapter(list[Annotated[list[NonNegativeInt], Len(1)]]),
    "errors": TypeAdapter(list[list[float]]),
    "models": TypeAdapter(dict[str, Figures]),
    "unseen": TypeAdapter(dict[str, dict[str, Figures]]),
    "expert_figures": TypeAdapter(dict[str, Any]),
}
"""What the other facts must look like, where they are told, since the record is made of them."""
NUMBERS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""Types of leaves that can be merged."""


def no_leaves(shapes: Shapes, package: Bundle, reply: Bundle) -> Mapping[str, Shapes]:
    """Facts alone."""
    return {}


def any_leaves(shapes: Shapes, package: Bundle, reply: Bundle) -> Mapping[str, Shapes]:
    """Whatever it holds, as long as its numbers are finite."""
    return {name: shapes_of(tree) for name, tree in reply.trees.items()}


def as_packed(shapes: Shapes, package: Bundle, reply: Bundle) -> Mapping[str, Shapes]:
    """The shared leaves that the client was sent, but residuals, which stay as they came."""
    return {"shared": {key: shape for key, shape in shapes_of(package.tree("shared")).items() if not is_residual(key)}}


def shapes_of(tree: Tree) -> Shapes:
    """The shapes of leaves."""
    return {key: tuple(leaf.shape) for key, leaf in tree.items()}


@dataclass(frozen=True, kw_only=True)
class Due:
    """What the reply to a question must hold."""

    leaves: Form = no_leaves
    facts: tuple[str, ...] = ()
    """Names of facts that it can't do without."""
    longest: float | None = None
    """Largest Euclidean norm of the change of the shared leaves; empty: any."""
    dtype: torch.dtype | None = None
    """Type of its leaves; None: numbers with a point, all of them finite."""


def usable(
    replies: Iterator[Reply], packages: Mapping[str, Bundle], due: Due, shapes: Shapes, lost: Callable[[str, str], None]
) -> Iterator[Reply]:
    """The replies that hold what was due; `lost` hears the client and the reason of each other one."""
    for reply in replies:
        try:
            package = packages[reply.client]
            _check(reply.bundle, due.leaves(shapes, package, reply.bundle), due)
            if due.longest is not None and (norm := change(reply.bundle, package)) > due.longest:
                raise ValueError(f"its change has the norm {norm:.4g}, federation.norm_limit is {due.longest:g}")
        except ValueError as error:
            lost(reply.client, f"the reply of client {reply.client!r} can't be used: {error}")
        else:
            yield reply


def change(reply: Bundle, package: Bundle) -> float:
    """The Euclidean norm over all shared leaves of what a client has changed of them."""
    return math.sqrt(sum(float(leaf.square().sum()) for leaf in subtract(reply.tree("shared"), package.tree("shared")).values()))


def _check(reply: Bundle, leaves: Mapping[str, Shapes], due: Due) -> None:
    """Compare a reply with what was due.

    Raises:
        ValueError: a leaf is missing, superfluous, of another shape or not finite, or a fact is missing or of another form.
    """
    for name in sorted(reply.trees.keys() | leaves.keys()):
        _check_tree(name, reply.tree(name), leaves.get(name, {}), due.dtype)
    if missing := [name for name in due.facts if name not in reply.facts]:
        raise ValueError(f"it does not tell {missing[0]!r}")
    for name, least in LEAST.items():
        fact = reply.facts.get(name)
        if fact is not None and (isinstance(fact, bool) or not isinstance(fact, int | float) or not least <= fact <= MOST):
            raise ValueError(f"its {name!r} is {repr(fact)[:100]}")
    for name in sorted(FORMS.keys() & reply.facts.keys()):
        try:
            FORMS[name].validate_python(reply.facts[name], strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
            raise ValueError(f"its {name!r} is not what it should be ({problem['loc']}: {problem['msg']})"[:500]) from None


def _check_tree(name: str, tree: Tree, due: Shapes, dtype: torch.dtype | None) -> None:
    for key in sorted(tree.keys() ^ due.keys()):
        raise ValueError(f"leaf {key!r} of {name!r} is {'missing' if key in due else 'there and was not asked for'}")
    for key, leaf in sorted(tree.items()):
        if tuple(leaf.shape) != tuple(due[key]):
            raise ValueError(f"leaf {key!r} of {name!r} has shape {tuple(leaf.shape)} in place of {tuple(due[key])}")
        if dtype is not None:
            if leaf.dtype != dtype:
                raise ValueError(f"leaf {key!r} of {name!r} is {leaf.dtype} in place of {dtype}")
            continue
        if leaf.dtype not in NUMBERS or not leaf.isfinite().all():
            raise ValueError(f"leaf {key!r} of {name!r} holds numbers that are not finite")
