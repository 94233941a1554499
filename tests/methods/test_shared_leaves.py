"""Which leaves are shared is `lora.targets`, for every method alike; what each form costs."""

from __future__ import annotations

import math

import pytest

from fedgraft.bundle import Bundle
from fedgraft.grafts.graft import adapter_shapes
from fedgraft.moe.load import load_base
from fedgraft.recipe import load_recipe
from fedgraft.runner import run as run_recipe
from fedgraft.tree import num_bytes

ATTENTION, SHARED, EXPERTS, ROUTER = ["q", "k", "v", "o"], ["shared"], ["experts"], ["router"]
FORMS = {
    "attention": ATTENTION,
    "non-expert": ATTENTION + SHARED,
    "with every expert": ATTENTION + SHARED + EXPERTS,
    "experts only": EXPERTS,
    "everything": ATTENTION + SHARED + EXPERTS + ROUTER,
}
# Numbers per layer of the tiny Qwen2-MoE at rank 4: hidden 32, 4 heads of 8, 2 of them for k and v, shared expert 32, 8 experts of 16.
NUMBERS = {"attention": 4 * (64 + 48 + 48 + 64), "shared": 4 * 3 * (32 + 32), "expert": 8 * 4 * 3 * (32 + 16), "router": 8 * 32}
PLACES = {
    "attention": ["attention"],
    "non-expert": ["attention", "shared"],
    "with every expert": ["attention", "shared", "expert"],
    "experts only": ["expert"],
    "everything": ["attention", "shared", "expert", "router"],
}


def sent(run):
    """Trees of the replies to `train`."""
    return [Bundle.decode(content).trees for question, _, content in run.up if question == "train"]


@pytest.mark.parametrize("form", FORMS)
def test_bytes_of_each_form(start, form):
    """Two layers, four bytes a number; the wire adds a header of at most 150 bytes a leaf."""
    run = start("fedavg", clients=("ada", "bo"), federation={"rounds": 1}, lora={"targets": FORMS[form]}).go()
    expected = 2 * 4 * sum(NUMBERS[place] for place in PLACES[form])
    assert {key.split(".")[2] for key in run.state} == set(PLACES[form])
    assert [num_bytes(trees["shared"]) for trees in sent(run)] == [expected, expected]
    assert all(leaf.any() for key, leaf in run.state.items() if ".expert." not in key)
    assert any(leaf.any() for key, leaf in run.state.items() if key.endswith(".B"))  # some experts saw no token
    assert all(expected < len(content) < expected + 150 * len(run.state) + 600 for question, _, content in run.up if question == "train")


@pytest.mark.parametrize("method", ["fedprox", "scaffold", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "centralised", "flex"])
def test_every_global_method_can_share_everything(start, method):
    """SCAFFOLD sends as much again."""
    training = {"optimizer_state": "kept"}
    run = start(method, clients=("ada", "bo"), federation={"rounds": 2}, lora={"targets": FORMS["everything"]}, training=training).go()
    size = 2 * 4 * sum(NUMBERS.values())
    assert run.session.account.bytes_up() == size * (1 + (method == "scaffold"))
    assert num_bytes(run.state) == size
    assert [sum(map(num_bytes, trees.values())) for trees in sent(run)] == [size * (1 + (method == "scaffold"))] * 2 * len(run.sites)


@pytest.mark.parametrize(
    ("method", "options", "targets", "message"),
    [
        ("flex", {"private_router": True}, ["router"], "none would travel"),
        ("flex", {"private_router": True}, ["q"], "lora.targets: method 'flex' with these options needs 'router' there; add it"),
        ("fedsa_lora", {}, ["router"], "none would stay on the client"),
        ("ffa_lora", {}, ["router"], "none would stay on the client"),
        ("fedper", {"layers": 2}, ["q"], "method.layers: 2 of 2 adapted layers can't be personal"),
    ],
)
def test_targets_and_options_that_leave_nothing_shared_or_nothing_private_are_refused_before_training(
    place, tmp_path, method, options, targets, message
):
    with pytest.raises(ValueError, match=message):
        run_recipe(place.recipe(method, lora={"targets": targets}) | {"method": {"name": method, **options}}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_shipped_recipe_of_the_naive_way_says_its_bytes():
    """Embedded base at rank 8: 6 layers, hidden 192, attention 192, shared expert 384, 16 experts of 96, routers [16, 192]."""
    recipe = load_recipe("aggregate_everything")
    numbers = sum(math.prod(shape) for shape in adapter_shapes(load_base(recipe.model), recipe.lora).values())
    assert numbers == 6 * (8 * 4 * 384 + 8 * 3 * (192 + 384) + 16 * 8 * 3 * (192 + 96) + 16 * 192) == 838_656
    usual = sum(math.prod(shape) for shape in adapter_shapes(load_base(recipe.model), load_recipe("demo").lora).values())
    assert numbers / usual == pytest.approx(15.2, abs=0.05)
