"""Personalise pretrained Mixture-of-Experts language models by federated learning and expert grafting.

The public names are resolved on first use, so `import fedgraft` loads neither torch nor transformers. A public name never
equals the name of a submodule: importing a submodule sets an attribute of that name on the package and would shadow it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedgraft.recipe import Recipe, load_recipe
    from fedgraft.runner import resume, run
    from fedgraft.use.load import load
    from fedgraft.use.loaded import Loaded

__all__ = ["Loaded", "Recipe", "__version__", "load", "load_recipe", "resume", "run"]
__version__ = "0.1.0"

PUBLIC = {
    "Recipe": "fedgraft.recipe",
    "load_recipe": "fedgraft.recipe",
    "run": "fedgraft.runner",
    "resume": "fedgraft.runner",
    "load": "fedgraft.use.load",
    "Loaded": "fedgraft.use.loaded",
}


def __getattr__(name: str) -> Any:
    """The public object of that name, from the module that defines it.

    Raises:
        AttributeError: the package has no public object of that name.
    """
    if name not in PUBLIC:
        raise AttributeError(f"module 'fedgraft' has no attribute {name!r}; it offers {', '.join(PUBLIC)}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    """Module attributes and the public names."""
    return sorted({*globals(), *PUBLIC})
