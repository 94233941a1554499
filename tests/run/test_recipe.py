"""Recipes: what is written is what is meant, and every mistake is named with its remedy."""

from __future__ import annotations

import pytest
import yaml

from fedgraft.methods import fedavg
from fedgraft.methods.method import Method
from fedgraft.recipe import METHOD_SECTIONS, Recipe, load_recipe
from fedgraft.report.record import read_recipe, write_recipe
from fedgraft.yaml_text import read_yaml


def set_(*assignments: str, source=None) -> Recipe:
    return load_recipe(source if source is not None else {}, list(assignments))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4e-5", 4e-5),
        ("1e-3", 1e-3),
        ("2E3", 2000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5e+2", -150.0),
        ("1", 1),
        ("-3", -3),
        ("0", 0),
        ("1_000", 1000),
        ("0x10", 16),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("cuda:1", "cuda:1"),
        ("1.2.3", "1.2.3"),
        ("4e-5x", "4e-5x"),
        ("e5", "e5"),
        ("-", "-"),
        ("'4e-5'", "4e-5"),
        ("client-01", "client-01"),
        ("inf", "inf"),
        ("[q, k]", ["q", "k"]),
    ],
)
def test_yaml_scalars_are_what_people_write(text, value):
    read = read_yaml(f"key: {text if text != '-' else repr(text)}", "here")["key"]
    assert read == value
    assert type(read) is type(value)


def test_numbers_keep_the_type_of_their_field():
    recipe = set_("training.lr=1", "training.weight_decay=1e-2", "federation.rounds=12", "data.alpha=1", "lora.alpha=8")
    assert (recipe.training.lr, recipe.training.weight_decay, recipe.data.alpha, recipe.lora.alpha) == (1.0, 0.01, 1.0, 8.0)
    assert recipe.federation.rounds == 12
    assert type(recipe.federation.rounds) is int
    assert type(recipe.training.lr) is float


@pytest.mark.parametrize(
    ("assignment", "read"),
    [
        ("training.lr=4e-5", lambda recipe: recipe.training.lr == 4e-5),
        ("lora.targets=[q, v]", lambda recipe: recipe.lora.targets == ("q", "v")),
        ("model.name='x=y'", lambda recipe: recipe.model.name == "x=y"),
        ('data.path="a: b"', lambda recipe: recipe.data.path == "a: b"),
        ("data.categories=['1', two]", lambda recipe: recipe.data.categories == ["1", "two"]),
        ("data.path=", lambda recipe: recipe.data.path is None),
        ("federation.clients_per_round=null", lambda recipe: recipe.federation.clients_per_round is None),
        ("seed=3", lambda recipe: recipe.seed == 3),
        ("training={steps: 9}", lambda recipe: recipe.training.steps == 9),
        ("evaluation.generate=no", lambda recipe: recipe.evaluation.generate is False),
    ],
)
def test_set_forms(assignment, read):
    assert read(set_(assignment))


def test_set_changes_one_key_of_a_section_and_not_its_source():
    source = {"training": {"steps": 3, "lr": 1e-3}}
    recipe = set_("training.steps=7", "training.steps=8", "method.name=fedavg", source=source)
    assert (recipe.training.steps, recipe.training.lr, recipe.method.name) == (8, 1e-3, "fedavg")
    assert source == {"training": {"steps": 3, "lr": 1e-3}}


def test_set_on_a_recipe_object_keeps_what_was_set():
    recipe = set_("training.steps=7", source=load_recipe({"training": {"lr": 0.5}}))
    assert (recipe.training.steps, recipe.training.lr) == (7, 0.5)
    assert recipe.model_fields_set == {"training"}


def test_null_takes_a_section_back():
    recipe = set_("graft=null", "method.name=fedavg", source={"graft": {"train": "full"}})
    assert "graft" not in recipe.model_fields_set
    recipe.build_method()


@pytest.mark.parametrize(
    ("source", "assignments", "words"),
    [
        ({"trainig": {}}, [], ["recipe: unknown key 'trainig' (did you mean 'training'?)", "there are: model, data, method"]),
        ({"training": {"lrr": 1}}, [], ["unknown key 'training.lrr' (did you mean 'lr'?)", "steps, batch_size"]),
        ({"training": {"lr": "fast"}}, [], ["training.lr", "valid number", "'fast'"]),
        ({"training": {"lr": 0}}, [], ["training.lr", "greater than 0"]),
        ({"training": {"steps": 1.5}}, [], ["training.steps", "1.5"]),
        ({"model": {"dtype": "float8"}}, [], ["model.dtype", "'float32', 'bfloat16' or 'float16'", "'float8'"]),
        ({"model": {"name": None}}, [], ["model.name", "valid string"]),
        ({"seed": -1}, [], ["seed", "greater than or equal to 0"]),
        ({"data": {"categories": [1]}}, [], ["data.categories.0", "valid string"]),
        ({"evaluation": {"models": ["best"]}}, [], ["evaluation.models.0", "'personal'", "'best'"]),
        ({"engine": {"name": "flowr"}}, [], ["engine.name", "inprocess"]),
        ({"method": {"name": "flx"}}, [], ["recipe: unknown method 'flx' (did you mean 'flex'?)", "fedavg", "local"]),
        ({"data": {"dataset": "doly"}}, [], ["unknown dataset 'doly' (did you mean 'dolly'?)", "jsonl"]),
        ({"selection": {"criterion": "reconstruct"}}, [], ["unknown criterion 'reconstruct' (did you mean", "gate_mass"]),
        ({"method": {"name": "fedavg", "mu": 1}}, [], ["method.mu: 'fedavg' has no such option", "its options: none"]),
        ({"method": {"name": "fedavg"}, "graft": {"per_layer": 1}}, [], ["graft: set in the recipe, but method 'fedavg' doesn't use it"]),
        ({"method": {"name": "local"}, "selection": {}}, [], ["selection: set in the recipe, but method 'local'", "--set selection=null"]),
        ({}, ["training.lr"], ["--set training.lr: write section.key=value"]),
        ({}, ["=3"], ["--set =3: write section.key=value"]),
        ({}, ["training.lr=[1"], ["--set training.lr=[1: the value is not valid YAML; quote it"]),
        ({}, ["training.lr.x=1"], ["training.lr", "valid number"]),
        ({}, ["training..lr=1"], ["unknown key 'training.'"]),
        ({}, ["training=5"], ["training", "TrainingSettings"]),
    ],
)
def test_mistakes_name_the_key_and_what_there_is(source, assignments, words):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        load_recipe(source, assignments)
    for word in words:
        assert word in str(refused.value)


def test_two_mistakes_are_told_at_once():
    with pytest.raises(ValueError, match=r"(?s)federation\.rounds.*\ntraining\.lr"):
        load_recipe({"training": {"lr": "x"}, "federation": {"rounds": "y"}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model:\n  name: demo\n  dtype: [float32\ntraining: {}\n", "line 4: not valid YAML"),
        ("training:\n\tlr: 1\n", "line 2: not valid YAML"),
        ("seed: 1\ntraining: {lr: 1}\nseed: 2\n", "line 3: not valid YAML (key 'seed' occurs twice)"),
        ("training:\n  lr: 1\n  lr: 2\n", "line 3: not valid YAML (key 'lr' occurs twice)"),
        ("when: !!python/name:os.system\n", "line 1: not valid YAML"),
        ("- flex\n", "a recipe is a mapping of sections, this is a list"),
        ("flex\n", "a recipe is a mapping of sections, this is a str"),
        ("training: {lrr: 1}\n", "unknown key 'training.lrr'"),
    ],
)
def test_errors_in_a_file_name_it(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml") as refused:
        load_recipe(path)
    assert words in str(refused.value)


def test_an_empty_file_is_all_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_recipe(tmp_path / "empty.yaml") == Recipe()


def test_shipped_recipes_are_found_by_name_and_guessed():
    assert load_recipe("demo") == load_recipe(None)
    with pytest.raises(ValueError, match=r"demmo: no such recipe file \(did you mean 'demo'\?\); shipped recipes: .*demo"):
        load_recipe("demmo")
    with pytest.raises(ValueError, match=r"nowhere/x.yaml: no such recipe file"):
        load_recipe("nowhere/x.yaml")


@pytest.mark.parametrize("method", ["flex", "fedavg", "local"])
def test_a_complete_recipe_has_every_default_and_reads_back(tmp_path, method):
    recipe = load_recipe({"method": {"name": method}, "training": {"lr": 4e-5, "lr_min": 1e-7}})
    complete = recipe.complete()
    used = recipe.build_method().sections
    for name in Recipe.model_fields:
        if name in METHOD_SECTIONS - used:
            assert name not in complete
        elif name not in {"method", "seed"}:
            section = type(getattr(recipe, name))
            assert complete[name].keys() == section.model_fields.keys()
    write_recipe(tmp_path / "recipe.yaml", complete)
    assert read_recipe(tmp_path / "recipe.yaml") == complete
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again.complete() == complete
    assert again.training == recipe.training


def test_options_of_a_method_are_checked_and_completed(monkeypatch):
    def build(mu: float = 0.1, start: str = "warm") -> Method:
        return Method()

    monkeypatch.setattr(fedavg, "build", build)
    recipe = load_recipe({"method": {"name": "fedavg", "mu": 0.5}})
    assert recipe.complete()["method"] == {"name": "fedavg", "mu": 0.5, "start": "warm"}
    assert load_recipe(recipe.complete()).complete() == recipe.complete()
    with pytest.raises(ValueError, match=r"method.stat: 'fedavg' has no such option \(did you mean 'start'\?\); its options: mu, start"):
        load_recipe({"method": {"name": "fedavg", "stat": "cold"}})


def test_recipes_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().training.lr = 1.0  # type: ignore[misc]


def test_yaml_dump_of_any_recipe_is_plain():
    """A recipe on disk has no tags, so that any YAML reader understands it."""
    assert "!!" not in yaml.safe_dump(Recipe().complete())
