"""What a method sends in a round and how much it trains, told from the fields of its frame."""

from __future__ import annotations

from functools import cache
from typing import Any

from fedgraft import address, plugins
from fedgraft.account.memory import workload
from fedgraft.account.take import ON_WIRE, Account, take_account
from fedgraft.grafts.lora import Shapes
from fedgraft.methods.method import settled, unchanged
from fedgraft.moe.skeleton import skeleton
from fedgraft.recipe import load_recipe

PARTS = {"A": "r·in", "B": "r·out", "residual": "in·out"}
"""Part of an address -> entries of such a leaf at a layer with `in` inputs, `out` outputs and pairs of rank r."""
BOTH = ("r·in", "r·out")


def sent(method: Any, pairs: Shapes) -> str:
    """Bytes per client and round in symbols, up and down; `pairs` are the low-rank pairs of some layers that the method was settled on."""
    shapes = method.leaves(pairs)
    shared = {key: shape for key, shape in shapes.items() if not method.personal(key)}
    if method.pooled:
        return "the training rows of all clients, once, to one site"
    if not shared:
        return "nothing"
    layers = {address.layer_of(key) for key in pairs}
    some = "" if {address.layer_of(key) for key in shared} == layers else ", of the layers that are shared"
    up, down = (_formula(leaves, method.wire_copies * ON_WIRE["fp32"]) for leaves in (shared, method.down(shared)))
    return f"{up} each way{some}" if method.down is unchanged else f"{up} up and at most {down} down{some}"


def _formula(leaves: Shapes, size: int) -> str:
    terms = sorted({PARTS[key.rpartition(".")[2]] for key in leaves}, key=list(PARTS.values()).index)
    pair = ["r·(in + out)"] if set(BOTH) <= set(terms) else [term for term in terms if term in BOTH]
    inner = " + ".join([*pair, *(term for term in terms if term not in BOTH)])
    return f"{size} Σ ({inner})" if " + " in inner.replace("in + out", "") else f"{size} Σ {inner}"


def trained(name: str) -> tuple[float, int]:
    """(parameters a client trains on the embedded base with the demo's settings, FedAvg's being 1; passes over a round's batches)."""
    account = _account(name)
    return account.trained / _account("fedavg").trained, account.passes


@cache
def _account(name: str) -> Account:
    recipe = load_recipe("demo")
    anatomy = skeleton(recipe.model)
    method = settled(plugins.load("method", name).build(), anatomy, recipe.lora, ["one", "two"])
    work = workload(recipe.training, length=recipe.data.max_length, dtype=recipe.model.dtype)
    return take_account(anatomy, method, recipe.lora, recipe.graft, work)
