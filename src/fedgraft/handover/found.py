"""What lies in a folder that a run can start from, recognised by its content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgraft.bundle import Bundle
from fedgraft.grafts import peft_names
from fedgraft.grafts.lora import LoraSettings
from fedgraft.handover import peft_adapter
from fedgraft.moe.family import Anatomy
from fedgraft.report.record import read_document, read_recipe
from fedgraft.tree import Tree

ABOUT, LEAVES = "fedgraft.json", "leaves.safetensors"
"""Files of an export in fedgraft's own format."""
RECIPE, STATE = "recipe.yaml", Path("state") / "state.safetensors"
ACCEPTED = "a PEFT adapter (adapter_config.json), what `fedgraft export --as fedgraft` wrote, or a run folder"


@dataclass(frozen=True, kw_only=True)
class Found:
    """Leaves and what they mean."""

    file: Path
    """Where the leaves lie, for messages."""
    tree: Tree
    """By address."""
    scales: dict[str, float]
    """Head of the addresses of a pair -> the factor that B A is multiplied by."""
    base_digest: str | None
    """Of the base that they were trained on; None where that is not known."""
    dropout: float
    """Of the inputs of A, when it was trained."""


def read(folder: str | Path, anatomy: Anatomy) -> Found:
    """What lies in a folder.

    Args:
        folder: as `lora.init` names it.
        anatomy: of the base it is to be put on.

    Raises:
        ValueError: nothing that a run can start from, a damaged file, or an adapter of a kind that is no LoRA on linear layers.
    """
    folder = Path(folder).expanduser()
    for name, reader in READERS.items():
        if (folder / name).is_file():
            return reader(folder, anatomy)
    raise ValueError(f"lora.init: {folder}: {'nothing there to start from' if folder.is_dir() else 'no such folder'}; name {ACCEPTED}")


def recipe_of(folder: str | Path) -> dict[str, Any]:
    """The recipe that a folder was trained by, as far as it tells: of a run all of it, of an export the parts that a model is used with.

    Of a PEFT adapter it is `model.name`, where that is told.

    Raises:
        ValueError: as `read`.
    """
    folder = Path(folder).expanduser()
    for name, teller in TELLERS.items():
        if (folder / name).is_file():
            return teller(folder / name)
    raise ValueError(f"{folder}: {'nothing there to start from' if folder.is_dir() else 'no such folder'}; name {ACCEPTED}")


def _adapter(folder: Path, anatomy: Anatomy) -> Found:
    adapter = peft_adapter.read(folder, anatomy)
    return Found(file=adapter.file, tree=adapter.tree, scales=adapter.scales, base_digest=None, dropout=adapter.dropout)


def _export(folder: Path, anatomy: Anatomy) -> Found:
    document = read_document(folder / ABOUT)
    bundle = Bundle.load(folder / LEAVES)
    try:
        digest, recipe = str(document["base_digest"]), dict(document["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / ABOUT}: damaged ({error}); export the model again") from None
    if bundle.facts["experts"]:
        raise ValueError(
            f"lora.init: {folder}: it holds grafted experts, which are a client's own and no start for others; "
            "export the aggregated leaves alone: --client shared"
        )
    return _ours(folder / LEAVES, bundle.tree("model"), recipe, digest)


def _run(folder: Path, anatomy: Anatomy) -> Found:
    recipe = read_recipe(folder / RECIPE)
    digest = str(read_document(folder / "environment.json").get("base_digest", ""))
    if not (folder / STATE).is_file() or not digest:
        raise ValueError(f"lora.init: {folder}: the run has no finished step yet, so there is nothing to start from")
    shared = Bundle.load(folder / STATE).tree("shared")
    if not shared:
        method = recipe["method"]["name"]
        raise ValueError(f"lora.init: {folder}: its method {method!r} shares nothing, so there is nothing to start from; name another run")
    return _ours(folder / STATE, shared, recipe, digest)


def _ours(file: Path, tree: Tree, recipe: dict[str, Any], digest: str) -> Found:
    """Leaves by their addresses; a pair of rank r has the scale alpha / r."""
    lora = LoraSettings.model_validate(recipe["lora"])
    scales = {key.removesuffix(".A"): lora.alpha / len(leaf) for key, leaf in tree.items() if key.endswith(".A")}
    return Found(file=file, tree=tree, scales=scales, base_digest=digest, dropout=lora.dropout)


READERS: dict[str, Callable[[Path, Anatomy], Found]] = {
    ABOUT: _export,
    peft_names.CONFIG: _adapter,
    RECIPE: _run,
}
"""A file that tells what a folder is -> what reads it."""
TELLERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ABOUT: lambda path: dict(read_document(path)["recipe"]),
    peft_names.CONFIG: lambda path: {"model": {"name": base}} if (base := peft_adapter.base_of(path)) else {},
    RECIPE: read_recipe,
}
"""The same -> what tells the recipe."""
