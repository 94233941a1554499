"""A recipe that goes on from leaves which are there already, as it is written and run."""

from __future__ import annotations

import json

import pytest

from fedgraft.bundle import Bundle
from fedgraft.joining.importing import continuing, in_yaml
from fedgraft.recipe import load_recipe
from fedgraft.report.progress import Quiet
from fedgraft.session import Session
from fedgraft.tree import equal
from fedgraft.use.export.export import export


@pytest.fixture(params=["peft", "fedgraft"])
def exported(request, trained, tmp_path):
    export(trained("flex").folder, "shared", request.param, tmp_path / "export")
    return tmp_path / "export"


def started(path, folder):
    """The shared leaves that a recipe's run begins with."""
    session = Session(load_recipe(path).absolute(), folder, Quiet())
    session.method = session.method.__class__(personal=session.method.personal)  # no experts need be chosen for that
    session._open()
    return session.server.state.tree("shared")


def test_the_recipe_of_an_export_starts_from_its_leaves(command, exported, trained, world, tmp_path):
    out = tmp_path / "recipe.yaml"
    done = command("import", exported, "--data", world.data, "--out", out)
    assert done.code == 0, done.err
    assert "rank 2, alpha 4.0, targets ['q', 'k', 'v']" in done.out
    recipe = load_recipe(out)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (2, 4.0, ("q", "k", "v"))
    assert (recipe.method.name, recipe.data.path, recipe.model.name) == ("flex", str(world.data), str(world.model))
    assert "# bit for bit" in out.read_text() or "bit for bit" in out.read_text()
    assert equal(started(out, tmp_path / "run"), Bundle.load(trained("flex").folder / "state" / "state.safetensors").tree("shared"))
    assert command("import", exported, "--data", world.data, "--out", out).code == 2  # never overwritten


def test_the_recipe_of_a_run_is_its_own_with_another_start(command, trained, tmp_path):
    first, out = trained("flex"), tmp_path / "recipe.yaml"
    document = json.loads(command("import", first.folder, "--out", out, "--json").out)
    assert document["values"]["data"] == first.recipe["data"]
    recipe = load_recipe(out)
    assert recipe.lora.init == str(first.folder)
    assert recipe.complete() == {**first.recipe, "lora": {**first.recipe["lora"], "init": str(first.folder)}}


def test_another_method_goes_on(trained):
    values, _ = continuing(trained("flex").folder, method="ditto")
    assert values["method"] == {"name": "ditto"}
    assert "graft" not in values
    assert load_recipe(values).lora.rank == 2
    assert "lora" in in_yaml(values, {}, "x")


def test_what_is_not_known_is_asked_for(trained, world, tmp_path):
    export(trained("flex").folder, "shared", "peft", tmp_path / "adapter")
    with pytest.raises(ValueError, match="tells of no rows to go on with; name them with --data"):
        continuing(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say which base it is of; name it with --model"):
        continuing(tmp_path / "adapter", data=str(world.data))
    values, _ = continuing(tmp_path / "adapter", data=str(world.data), model=str(world.model))
    assert values["model"]["name"] == str(world.model)
