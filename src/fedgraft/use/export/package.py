"""fedgraft's own format: the leaves of one model with what is needed to put them on their base."""

from __future__ import annotations

from pathlib import Path

from fedgraft.bundle import Bundle
from fedgraft.grafts.lora import LoraSettings
from fedgraft.handover.found import ABOUT, LEAVES
from fedgraft.report.record import write_document
from fedgraft.tree import clone
from fedgraft.use.export.subject import Subject, Written

PARTS = {
    "model": None,
    "lora": set(LoraSettings.model_fields) - {"init"},
    "graft": None,
    "method": None,
    "selection": None,
    "data": {"template", "max_length"},
    "training": None,
    "seed": None,
}
"""Sections of the recipe that a model is used or joined with, and which of their keys where not all."""
LOADING = """import fedgraft
loaded = fedgraft.load(FOLDER)
model, tokenizer = loaded.model, loaded.tokenizer"""


def write(subject: Subject, folder: Path) -> Written:
    """Write `fedgraft.json` and `leaves.safetensors`; the base is named with its digest and found again by that."""
    loaded, model = subject.loaded, subject.loaded.prediction(subject.name)
    experts = [list(layer) for layer in model.experts]
    Bundle(trees={"model": clone(model.tree)}, facts={"experts": experts}).save(folder / LEAVES)
    recipe = subject.recipe.absolute().complete()
    kept = {part: {key: recipe[part][key] for key in keys} if keys else recipe[part] for part, keys in PARTS.items() if part in recipe}
    document = {"name": subject.name, "base_digest": loaded.source.base_digest, "recipe": kept, "about": subject.about}
    write_document(folder / ABOUT, document)
    return Written(kind="fedgraft (leaves on their base)", loading=LOADING)
