"""Which points a sweep has, what they are called, and that no mistake gets past the plan."""

from __future__ import annotations

import re

import pytest
import yaml

from fedgraft.recipe import load_recipe
from fedgraft.sweep.plan import LONGEST, PLAIN, plan

FLEX = {"method": {"name": "flex"}, "lora": {"rank": 4}, "graft": {"per_layer": 1}, "selection": {"tokens": 64}}


def names(*grids: str, source=None, overrides=None) -> list[str]:
    return [point.name for point in plan(source if source is not None else FLEX, grids, overrides)]


def test_points_are_the_product_the_first_key_slowest():
    points = plan(FLEX, ["method=fedavg,flex", "seed=0,1"])
    assert [point.name for point in points] == ["fedavg_seed-0", "fedavg_seed-1", "flex_seed-0", "flex_seed-1"]
    assert [(point.recipe.method.name, point.recipe.seed) for point in points] == [("fedavg", 0), ("fedavg", 1), ("flex", 0), ("flex", 1)]
    assert points[1].settings == {"method.name": "fedavg", "seed": 1}


def test_a_recipe_without_grid_is_one_point():
    (point,) = plan(FLEX)
    assert point.name == "run"
    assert point.recipe.complete() == load_recipe(FLEX).absolute().complete()


def test_values_are_yaml():
    points = plan(FLEX, ["lora.targets=[q],[q, k]", "training.lr=4e-5,1e-3", "training.checkpointing=true"])
    assert [point.recipe.lora.targets for point in points[::2]] == [("q",), ("q", "k")]
    assert points[0].recipe.training.lr == 4e-5
    assert points[0].name == "lora.targets-q_training.checkpointing-true_training.lr-4e-05"
    assert points[2].name.startswith("lora.targets-q+k_")


def test_sections_that_a_method_does_not_use_are_dropped():
    fedavg, flex = plan(FLEX, ["method=fedavg,flex"])
    assert "graft" not in fedavg.recipe.complete()
    assert flex.recipe.graft.per_layer == 1
    assert fedavg.recipe.lora.rank == 4


def test_points_that_are_the_same_are_one():
    """FedAvg has no graft, so its number of grafts makes no second run."""
    assert names("method=fedavg,flex", "graft.per_layer=1,2") == ["fedavg", "flex_graft.per_layer-1", "flex_graft.per_layer-2"]


def test_a_method_of_the_grid_does_not_inherit_the_options_of_another(monkeypatch):
    from fedgraft.methods import fedavg
    from fedgraft.methods.method import Method

    monkeypatch.setattr(fedavg, "build", lambda mu=0.1: Method())
    source = {"method": {"name": "fedavg", "mu": 0.5}, "grid": {"method": ["fedavg", "local"]}}
    first, second = plan(source)
    assert first.recipe.complete()["method"] == {"name": "fedavg", "mu": 0.5}
    assert second.recipe.complete()["method"] == {"name": "local"}
    assert names("method.mu=0.1,0.2", source={"method": {"name": "fedavg"}}) == ["method.mu-0.1", "method.mu-0.2"]


def test_a_sweep_file(tmp_path):
    path = tmp_path / "mine.yaml"
    content = {
        **FLEX,
        "grid": {"seed": [0, 1]},
        "variants": {"plain": None, "two": {"graft.per_layer": 2}, "none": {"method": "fedavg"}},
        "per_method": {"fedavg": {"training.lr": 0.5, "seed": 9}, "flex": {"training.lr": 0.25}},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    points = plan(path)
    assert [point.name for point in points] == ["plain_seed-0", "plain_seed-1", "two_seed-0", "two_seed-1", "none_seed-0", "none_seed-1"]
    assert [point.recipe.training.lr for point in points] == [0.25] * 4 + [0.5] * 2
    assert [point.recipe.seed for point in points] == [0, 1] * 3  # the grid wins over per_method
    assert points[2].recipe.graft.per_layer == 2
    assert points[2].settings == {"variant": "two", "seed": 0}
    assert [point.recipe.seed for point in plan(path, ["seed=5"])] == [5] * 3  # replaces the file's
    with pytest.raises(ValueError, match=r"mine.yaml: grid: this is a sweep.*fedgraft sweep"):
        load_recipe(path)


def test_overrides_stand_below_the_grid():
    assert [point.recipe.seed for point in plan(FLEX, ["seed=1"], ["seed=5"])] == [1]
    assert plan(FLEX, ["seed=1"], ["lora.rank=3"])[0].recipe.lora.rank == 3


def test_names_do_not_depend_on_the_rest_of_the_grid():
    assert set(names("seed=0,1")) < set(names("seed=2,1,0"))


def test_names_do_not_depend_on_the_order_of_keys():
    expected = ["flex_lora.alpha-2_lora.rank-3_seed-0"]
    assert (
        names("lora.rank=3", "seed=0", "method=flex", "lora.alpha=2")
        == names("seed=0", "lora.alpha=2", "method=flex", "lora.rank=3")
        == expected
    )


@pytest.mark.parametrize("value", ["Qwen/Qwen1.5-MoE", "a b", "x" * 200, "'../up'", "'a:b'", "ä", "'dot.'", "'..'"])
def test_names_are_safe_for_any_file_system_and_tell_values_apart(value):
    (name,) = names(f"model.name={value}")
    assert PLAIN.fullmatch(name)
    assert len(name) <= LONGEST
    assert not name.endswith(".")
    assert re.search(r"-[0-9a-f]{8}$", name)
    assert name == name.casefold()


@pytest.mark.parametrize("variant", ["con", "nul.x", "COM1", "recipes", "logs"])
def test_names_are_not_those_of_devices_or_own_folders(variant):
    (name,) = names(source={**FLEX, "variants": {variant: {}}})
    assert name.startswith(f"{variant.lower()}-")


def test_upper_and_lower_case_make_two_names():
    found = names("data.path=x,X")
    assert len({name.casefold() for name in found}) == 2


@pytest.mark.parametrize(
    ("grids", "told"),
    [
        (["seed"], "--grid seed: write key=value,value"),
        (["seed="], "--grid seed="),
        (["=1"], "--grid =1"),
        (["seed=[1"], "not valid YAML"),
        (["method=flex,flexx"], "did you mean 'flex'"),
        (["training.lrr=1,2"], "did you mean 'lr'"),
        (["method=fedavg", "graft.per_layr=1"], "did you mean 'per_layer'"),  # also where the section is dropped
        (["seed=0,-1"], "seed"),
        (["method.mu=1"], "has no such option"),
        (["selection.criterion=reconstruction,nonsense"], "unknown criterion"),
    ],
)
def test_mistakes_are_told(grids, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        plan(FLEX, grids)


def test_a_mistake_names_its_point():
    with pytest.raises(ValueError, match=r"point method\.name=flex, seed=-1"):
        plan(FLEX, ["method=flex", "seed=0,-1"])


@pytest.mark.parametrize(
    ("section", "value", "told"),
    [
        ("grid", [1], "a mapping of keys to lists"),
        ("grid", {"seed": 1}, "seed: write at least one value"),
        ("grid", {"seed": []}, "seed: write at least one value"),
        ("variants", ["a"], "write names"),
        ("variants", {"a": 1}, "write names"),
        ("per_method", {"flexx": {}}, "did you mean 'flex'"),
    ],
)
def test_broken_sweep_files_are_told(section, value, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        plan({**FLEX, section: value})


def test_two_different_points_of_one_name_are_refused():
    """The text `null` and no path at all."""
    with pytest.raises(ValueError, match=r"two different points would be called 'data\.path-null'"):
        plan({**FLEX, "grid": {"data.path": [None, "null"]}})
