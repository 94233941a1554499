"""What the page of methods says about bytes and passes, against the counts."""

from __future__ import annotations

import math
import re

import pytest

from fedgraft import plugins
from fedgraft.grafts.lora import LoraSettings
from fedgraft.methods.method import Surroundings
from tools.docs.price import sent, trained

SIZES = {"r": 2, "in": 3, "out": 5}
PAIRS = {f"layers.{layer}.attention.q.{part}": shape for layer in (0, 1) for part, shape in (("A", (2, 3)), ("B", (5, 2)))}


def numbers(formula: str) -> int:
    """`4 Σ r·(in + out)` of one layer in figures."""
    for word, size in SIZES.items():
        formula = re.sub(rf"\b{word}\b", str(size), formula)
    return int(eval(formula.replace("Σ", "*").replace("·", "*"), {"__builtins__": {}}))


@pytest.mark.parametrize("name", plugins.names("method"))
def test_the_formula_counts_what_travels(name):
    """Of two layers of 3 inputs and 5 outputs with pairs of rank 2."""
    method = plugins.load("method", name).build()
    method = method.settle(method, Surroundings(shapes=PAIRS, lora=LoraSettings(rank=2), clients=["one", "two"]))
    shared = {key: shape for key, shape in method.leaves(PAIRS).items() if not method.personal(key)}
    said = sent(method, PAIRS)
    if method.pooled or not shared:
        assert said == ("the training rows of all clients, once, to one site" if method.pooled else "nothing")
        return
    formulas = re.fullmatch(r"(.+?) (?:each way|up and at most (.+?) down)(, of the layers that are shared)?", said)
    assert formulas, said
    layers = len({key.split(".")[1] for key in shared})
    assert (layers == 1) == (formulas[3] is not None)
    for formula, leaves in ((formulas[1], shared), (formulas[2] or formulas[1], method.down(shared))):
        assert layers * numbers(formula) == 4 * method.wire_copies * sum(map(math.prod, leaves.values()))


def test_trained_parameters_and_passes_are_told_against_fedavg():
    """The demo's base has 6 layers of hidden size 192, its graft one of 16 experts of 96 in full, with a gate; attention is 192 wide."""
    fedavg = 6 * 8 * 3 * 384
    assert trained("fedavg") == (1.0, 1)
    assert trained("ditto") == (2.0, 2)
    assert trained("ffa_lora") == (0.5, 1)
    assert trained("flex")[0] == pytest.approx(1 + 6 * (3 * 192 * 96 + 192) / fedavg, abs=0.01)
