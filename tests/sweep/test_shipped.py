"""The shipped sweeps: every point is a valid recipe, and its data can be drawn."""

from __future__ import annotations

from collections import Counter

import pytest

from fedgraft.data.partition import load_clients
from fedgraft.recipe import SWEEP_SECTIONS, load_recipe, read_values, shipped_names
from fedgraft.sweep.plan import plan

SWEEPS = [name for name in shipped_names() if set(SWEEP_SECTIONS) & read_values(name)[1].keys()]
EMBEDDED = [name for name in SWEEPS if "/" not in name]


def test_the_full_grids_are_there():
    assert set(SWEEPS) >= {"dolly_methods", "dolly_dirichlet", "flex_ablations", "paper/dolly_pathological", "paper/dolly_dirichlet"}


def test_the_papers_tables_use_the_forms_of_its_released_code():
    methods = {point.recipe.method.name: point.recipe.complete()["method"] for point in plan("paper/dolly_pathological")}
    assert methods["fedavgm"]["dampened"] is True
    assert methods["scaffold"]["weighted"] is True
    assert all(methods[name]["released"] is True for name in ("fedadam", "fedyogi", "fedadagrad"))


@pytest.mark.parametrize("name", SWEEPS)
def test_every_point_is_a_recipe_and_only_tuning_on_validation_rows_does_with_one_seed(name):
    points = plan(name)
    wanted = {"test": {0, 1, 2}, "validation": {0}}[points[0].recipe.evaluation.split]
    seeds = Counter()
    for point in points:
        assert load_recipe(point.recipe.complete()).complete() == point.recipe.complete()
        seeds[str(point.recipe.complete() | {"seed": None})] += 1
    assert set(seeds.values()) == {len(wanted)}
    assert {(point.recipe.seed, point.recipe.evaluation.split) for point in points} == {
        (seed, points[0].recipe.evaluation.split) for seed in wanted
    }


def test_ablations_change_one_thing_and_have_readable_names():
    points = [point for point in plan("flex_ablations") if point.recipe.seed == 0]
    names = [point.name for point in points]
    assert names[0] == "flex_seed-0"
    assert all(name == f"{point.settings['variant']}_seed-0" for name, point in zip(names, points, strict=True))
    by_name = {point.settings["variant"]: point.recipe for point in points}
    assert by_name["gate_off"].graft.gate == "off"
    criteria = {recipe.selection.criterion for recipe in by_name.values() if recipe.method.name == "flex"}
    assert criteria >= {"reconstruction", "scale_free_reconstruction", "random", "activation_frequency", "gate_mass", "reap"}
    assert {recipe.graft.per_layer for recipe in by_name.values()} == {1, 2, 3}


@pytest.mark.parametrize("name", EMBEDDED)
def test_data_can_be_drawn(name):
    drawn = {str((point.recipe.data, point.recipe.seed)): point.recipe for point in plan(name)}
    for recipe in drawn.values():
        clients = load_clients(recipe.data, recipe.seed)
        assert all(client.train and client.test for client in clients)
        if recipe.data.partition == "dirichlet":
            assert [len(client.train) for client in clients] == [recipe.data.train_rows] * recipe.data.clients


def test_rates_of_the_grids_were_tried_on_validation_rows():
    tried = [point.recipe for name in ("dolly_tuning", "dolly_tuning_server") for point in plan(name)]
    options = {(recipe.method.name, recipe.training.lr, str(recipe.complete()["method"])) for recipe in tried}
    assert set(Counter(recipe.method.name for recipe in tried).values()) == {3}
    chosen = read_values("dolly_methods")[1]["per_method"]
    assert chosen.keys() == {recipe.method.name for recipe in tried}
    for name in ("dolly_methods", "dolly_dirichlet", "federation_pays", "flex_clients", "unseen_clients"):
        own = read_values(name)[1]["per_method"]
        assert all(own[method] == chosen[method] for method in own), name
        for point in plan(name):
            recipe = point.recipe
            used = (recipe.method.name, recipe.training.lr, str(recipe.complete()["method"]))
            assert used in options or recipe.method.name not in chosen, point.name


def test_rates_of_the_rivals_of_the_graft_s_size_were_tried_at_that_size():
    tried = [point.recipe for point in plan("equal_size_tuning")]
    assert set(Counter(recipe.method.name for recipe in tried).values()) == {3}
    used = [point.recipe for point in plan("equal_size")]
    alike = ("data", "lora", "method", "federation", "training")
    known = [{section: recipe.complete()[section] for section in alike} for recipe in tried]
    assert all({section: recipe.complete()[section] for section in alike} in known for recipe in used)
