"""Methods that add second pairs or residuals to a layer's own pair, which only linear layers can carry."""

from __future__ import annotations

from collections.abc import Callable

from fedgraft.address import place_of
from fedgraft.grafts.lora import Shapes
from fedgraft.methods.method import Method, Surroundings, as_built


def check_pairs_on_linear_layers(shapes: Shapes) -> None:
    """Residuals and second pairs are added to the outputs of linear layers alone.

    Raises:
        ValueError: `lora.targets` names more than those.
    """
    elsewhere = sorted({place_of(key) for key in shapes} & {"expert", "router"})
    if elsewhere:
        targets = {"expert": "experts", "router": "router"}
        named = " and ".join(repr(targets[place]) for place in elsewhere)
        raise ValueError(
            f"lora.targets: this method adds further terms to linear layers and cannot do so at {named}; "
            "leave that out (there are q, k, v, o, mixer, shared, linear)"
        )


def on_linear_layers(change: Callable[[Method, Surroundings], Method] = as_built) -> Callable[[Method, Surroundings], Method]:
    """Settles a method by `change`, after a check that its further terms have a place."""

    def settle(method: Method, surroundings: Surroundings) -> Method:
        check_pairs_on_linear_layers(surroundings.shapes)
        return change(method, surroundings)

    return settle
