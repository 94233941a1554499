"""The leaves that a run starts from in the place of drawn ones (`lora.init`): fitted to the recipe's `lora`, or refused."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedgraft import address
from fedgraft.grafts.graft import adapter_shapes
from fedgraft.grafts.lora import LoraSettings, Shapes, Target, chosen_projections, fresh_pairs
from fedgraft.grafts.peft_names import layers_by_head
from fedgraft.handover.found import Found, read
from fedgraft.moe.family import Anatomy
from fedgraft.tree import Tree


def start_of(lora: LoraSettings, anatomy: Anatomy, base_digest: str, seed: int) -> Tree:
    """The leaves that `lora.init` names, which compute with `lora` what they computed where they were trained.

    Empty without `lora.init`. Another scale than `alpha / rank` is folded into B. Pairs of a lower rank than the others are filled up with
    drawn rows of A and zeros in B. Rows of routers that the source lacks are left out: they are the pretrained ones.

    Args:
        lora: the recipe's section.
        anatomy: the base's.
        base_digest: the base's.
        seed: the run's.

    Raises:
        ValueError: as `read`; or leaves of another base, of other layers, or of another rank; names file, leaf and remedy.
    """
    if lora.init is None:
        return {}
    found = read(lora.init, anatomy)
    if found.base_digest is not None and found.base_digest != base_digest:
        raise ValueError(
            f"lora.init: {found.file}: its leaves belong to another base than model.name is (digest {found.base_digest[:12]}, "
            f"here {base_digest[:12]}); set model.name to that base"
        )
    shapes = adapter_shapes(anatomy, lora)
    _check_places(found, shapes, anatomy, lora)
    _check_ranks(found, shapes, lora)
    return {key: _fitted(found, key, shape, lora, seed) for key, shape in shapes.items() if key in found.tree}


def _check_places(found: Found, shapes: Shapes, anatomy: Anatomy, lora: LoraSettings) -> None:
    """Every leaf has a place, and every place but a router's has a leaf."""
    for key in sorted(found.tree.keys() - shapes.keys()):
        if address.is_residual(key) or address.place_of(key) not in PLACES:
            further = "; write it into the weights (fedgraft export --as merged) and name that as model.name, with fresh adapters"
            raise ValueError(
                f"lora.init: {found.file}: leaf {key!r} is no adapter that a run begins with{further if address.is_residual(key) else ''}"
            )
        if not _is_nothing(found.tree, key):
            raise ValueError(f"lora.init: {found.file}: leaf {key!r} is not among lora.targets; {_targets_for(found, anatomy)}")
    for key in shapes:
        if key not in found.tree and address.place_of(key) != "router":
            raise ValueError(
                f"lora.init: {found.file}: there is no leaf {key!r}, which lora.targets ({', '.join(lora.targets)}) ask for; "
                f"{_targets_for(found, anatomy)}"
            )


PLACES = frozenset({"attention", "mixer", "shared", "linear", "expert", "router"})
"""Where a run can have adapters."""


def _is_nothing(tree: Mapping[str, Tensor], key: str) -> bool:
    """Whether the pair that a leaf belongs to adds zero, as exports have where nothing was trained."""
    head = key.rpartition(".")[0]
    return any(not tree[f"{head}.{factor}"].any() for factor in "AB" if f"{head}.{factor}" in tree)


def targets_of(found: Found, anatomy: Anatomy) -> list[str] | None:
    """The `lora.targets` that name just the layers which have a pair; None where none do."""
    held = {key.removesuffix(".A") for key in found.tree if key.endswith(".A") and not _is_nothing(found.tree, key)}
    heads = {part.path: head for head, part in layers_by_head(anatomy).items()}
    rows = ["router"] if any(address.place_of(key) == "router" for key in found.tree) else []
    experts = {head for head in held if address.place_of(f"{head}.A") == "expert"}
    chosen: list[str] = []
    covered: set[str] = set()
    for target in LINEAR:
        try:
            named = {heads[part.path] for part in chosen_projections(anatomy, (target,))}
        except ValueError:  # the model has no such layers
            continue
        if named <= held and not named <= covered:
            chosen.append(target)
            covered |= named
    return [*chosen, *rows, *(["experts"] if experts else [])] if covered == held - experts else None


LINEAR: tuple[Target, ...] = ("q", "k", "v", "o", "mixer", "shared", "linear")
"""The targets that name linear layers."""


def _targets_for(found: Found, anatomy: Anatomy) -> str:
    targets = targets_of(found, anatomy)
    if targets is None:
        return "it adapts a part of the layers that no lora.targets name; train it on all of them"
    return f"set lora.targets to [{', '.join(targets)}]"


def rank_of(tree: Mapping[str, Tensor]) -> int:
    """The largest rank of a pair; 0 where there is none."""
    return max((len(leaf) for key, leaf in tree.items() if key.endswith(".A")), default=0)


def _check_ranks(found: Found, shapes: Shapes, lora: LoraSettings) -> None:
    largest = rank_of({key: leaf for key, leaf in found.tree.items() if key in shapes})
    if largest != lora.rank:
        raise ValueError(f"lora.init: {found.file}: its pairs have rank {largest}, the recipe {lora.rank}; set lora.rank to {largest}")


def _fitted(found: Found, key: str, shape: tuple[int, ...], lora: LoraSettings, seed: int) -> Tensor:
    """One leaf in fp32, in the shape and with the scale of the run."""
    leaf, head, factor = found.tree[key].float(), key.rpartition(".")[0], key.rpartition(".")[2]
    if not torch.isfinite(leaf).all():
        raise ValueError(f"lora.init: {found.file}: leaf {key!r} holds numbers that are not finite; train it again")
    if factor not in {"A", "B"}:
        return _same_shape(found, key, leaf, shape)
    axis = 0 if factor == "A" else 1
    rank = leaf.shape[axis] if leaf.dim() == 2 else -1
    _same_shape(found, key, leaf, tuple(rank if at == axis else size for at, size in enumerate(shape)))
    if rank != len(found.tree[f"{head}.A"]):
        raise ValueError(f"lora.init: {found.file}: {head}: A has rank {len(found.tree[f'{head}.A'])}, B {rank}; copy it again")
    ratio = found.scales[head] / (lora.alpha / lora.rank)
    if factor == "B" and ratio != 1:
        leaf = (leaf.double() * ratio).float()
    return leaf if rank == lora.rank else torch.cat([leaf, _rest(key, shape, rank, seed)], dim=axis)


def _rest(key: str, shape: tuple[int, ...], rank: int, seed: int) -> Tensor:
    """The rows of A, or columns of B, that a pair of a lower rank lacks."""
    drawn = fresh_pairs({key: shape}, seed)[key]
    return drawn[rank:] if key.endswith(".A") else drawn[:, rank:]


def _same_shape(found: Found, key: str, leaf: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(leaf.shape) != shape:
        raise ValueError(
            f"lora.init: {found.file}: leaf {key!r} is {list(leaf.shape)} where the base asks for {list(shape)}; "
            "it belongs to another base, set model.name to that"
        )
    return leaf
