"""What a method, and the transforms among each other, cannot bear: refused before anything is loaded."""

from __future__ import annotations

from fedgraft.methods.method import Method
from fedgraft.transforms.attack import check_attack
from fedgraft.transforms.compression import check_compression
from fedgraft.transforms.privacy import Planned, check_privacy
from fedgraft.transforms.secure_aggregation.settings import check_secure_aggregation


def check_transforms(recipe: Planned, method: Method, name: str) -> None:
    """Every transform of a recipe with its method, by name.

    Raises:
        ValueError: one can't be used; says why, and what to set.
    """
    check_compression(recipe.compression, method, name)
    check_privacy(recipe, method, name)
    check_attack(recipe.attack, method, name, recipe.engine.name)
    coding, kept = recipe.compression.name, recipe.engine.keep_replies
    check_secure_aggregation(recipe.secure_aggregation, method, name, compression=coding, keep_replies=kept)
